"""A child's folder: the files it has besides its weights, and the plan that it was made from.

Reads `plan.json` and the headers of the weights; writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.spec import Plan

PLAN_FILE = "plan.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
OPTIONAL_TOKENIZER_FILES = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
CARRIED_FILES = ("generation_lengths.json", "LICENSE", "USAGE_POLICY", "NOTICE")


@dataclass(frozen=True)
class ChildFolder:
    """A child's folder, opened once.

    Attributes:
        checkpoint: its configuration and weights.
        plan: which experts of the parent it kept; None for a folder without plan.json.
    """

    checkpoint: Checkpoint
    plan: Plan | None

    @classmethod
    def open(cls, folder: Path) -> ChildFolder:
        """Open a folder and check that its plan is the plan of its weights.

        Raises:
            ValueError: the folder is no valid checkpoint, or its plan has other numbers of experts than its weights.
        """
        checkpoint, path = Checkpoint(folder), folder / PLAN_FILE
        if not path.is_file():
            return cls(checkpoint, None)
        plan = Plan.load(path)
        planned, found = [block.num_experts for block in plan.blocks], [count for count, _ in checkpoint.blocks]
        if planned != found:
            raise ValueError(
                f"{path} has {planned} experts in its layers, the weights have {found}; it is the plan of another child"
            )
        return cls(checkpoint, plan)
