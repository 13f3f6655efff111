"""What every training of a whole child shares: what trains, measuring it, saving it."""
