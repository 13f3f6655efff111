"""Reinforcement learning on verifiable rewards: settings, rewards, TRL's engine, and the recovery module."""
