"""An FP8 KV cache: scales by calibration, its simulation, what it costs."""
