"""Where the numbers of the cost model come from: counts, devices, and three sources of seconds."""
