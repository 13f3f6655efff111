"""Replace-1-block scores: what one candidate costs in quality, alone in the parent."""
