"""What serving a block costs: bytes, seconds, and three sources of seconds."""
