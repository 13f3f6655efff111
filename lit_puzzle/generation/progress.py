"""Progress of a long generation: a line on stderr every half minute, from the first process only.

A line, because generation may run inside a trainer that draws bars of its own. Of several engines that share the
prompts, the first one tells how far its own share is.
"""

import os
import sys
import time

from torch import distributed

EVERY_SECONDS = 30.0
ENGINE = "LIT_PUZZLE_ENGINE"  # number of this engine, where several share the prompts


class Progress:
    """Tells now and then how far a generation is; a short one says nothing.

    Args:
        total: completions that are generated.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.begun = self.told = time.monotonic()
        is_other_rank = distributed.is_initialized() and distributed.get_rank() > 0
        self.silent = is_other_rank or os.environ.get(ENGINE, "0") != "0"

    def update(self, finished: int, tokens: int) -> None:
        """Print a line if the last one is old enough.

        Args:
            finished: completions that have ended.
            tokens: generated tokens of all completions, ended or not.
        """
        now = time.monotonic()
        if self.silent or now - self.told < EVERY_SECONDS:
            return
        self.told = now
        speed = tokens / (now - self.begun)
        print(
            f"generated {finished:,} of {self.total:,} completions, {tokens:,} tokens, {speed:,.0f} tokens/s",
            file=sys.stderr,
            flush=True,
        )
