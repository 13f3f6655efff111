"""How anything is run, without torch: recipes, strict JSON, run folders."""
