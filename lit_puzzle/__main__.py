"""`python -m lit_puzzle` is the console script by another name; other ranks are started through it too."""

from lit_puzzle.cli import main

if __name__ == "__main__":
    main()
