"""What a completion consists of: the final answer, the thinking before it, and how it ended.

Only the final answer is graded. Whatever keeps a completion from having one is seen and counted (`Status`). Completions
are parsed by `lit_puzzle.environments.answer_formats`. Reads and writes nothing.
"""

from dataclasses import dataclass
from typing import Literal

Status = Literal["final", "no_final", "tool_call", "unfinished", "malformed"]
REASONS: dict[Status, str] = {  # why a completion without a final answer is graded 0
    "no_final": "no final answer",
    "tool_call": "tool call",
    "unfinished": "unfinished",
    "malformed": "malformed",
}


@dataclass(frozen=True)
class ParsedCompletion:
    """The parts of a completion.

    Attributes:
        final: text of the final answer without control tokens; None unless `status` is `final`.
        analysis: text of the thinking before it; None if there is none.
        status: `final`: ended by itself after a final answer; `no_final`: ended by itself without one; `tool_call`:
            ended by a call of a tool; `unfinished`: did not end; `malformed`: not of its format.
    """

    final: str | None
    analysis: str | None
    status: Status

    def __post_init__(self) -> None:
        if (self.final is None) == (self.status == "final"):
            raise ValueError(f"{self} was given; a completion has a final text if, and only if, its status is final.")
