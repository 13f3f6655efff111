"""Hostile inputs, kills, full disks and concurrent starts: what the product promises about them, tried."""
