"""Lightning callbacks of lit_puzzle; import them as lit_puzzle.callbacks."""
