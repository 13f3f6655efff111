"""The table of renamed modules, classes and keys; `lit_puzzle.run.renamed` reads it."""

MODULES: dict[str, str] = {}
SYMBOLS: dict[str, str] = {}
KEYS: dict[str, dict[str, str]] = {}
