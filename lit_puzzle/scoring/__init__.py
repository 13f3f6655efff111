"""Replace-1-block scores: the quality that each candidate costs alone in the parent."""
