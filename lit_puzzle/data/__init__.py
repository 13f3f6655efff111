"""Prompts to token batches: prompts, generated documents, packing, calibration data."""
