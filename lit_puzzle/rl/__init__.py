"""Reinforcement learning on verifiable rewards: environments, rewards, TRL's engine, and the recovery module."""
