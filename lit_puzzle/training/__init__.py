"""What all training shares: settings, sharding, trainable parameters, checkpoints, random state, processes."""
