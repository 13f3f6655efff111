"""Reports of finished and unfinished runs as text, without torch: `lightning show RUN`."""
