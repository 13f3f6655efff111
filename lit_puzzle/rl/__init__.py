"""Reinforcement learning on verifiable rewards: rewards, the TRL engine, the recovery module."""
