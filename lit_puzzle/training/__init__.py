"""What every optimization shares: sharding, what trains, checkpoints, random state, processes."""
