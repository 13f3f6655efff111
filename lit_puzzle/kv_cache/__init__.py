"""FP8 KV cache: scales, their calibration, and a simulation of the cache."""
