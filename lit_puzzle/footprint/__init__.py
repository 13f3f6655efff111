"""What a recipe costs before it starts: collects the footprints of all stages, and prints them."""
