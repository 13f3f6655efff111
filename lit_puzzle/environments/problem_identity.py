"""Identity of problems: a hash of what is put to a model and of the right answers.

Reads and writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from lit_puzzle.environments.environment import Environment, PromptAtEffort
from lit_puzzle.run.identity import Identity, text_hash


def problems_identity(source: str, pairs: Iterable[PromptAtEffort]) -> Identity:
    """Return the identity of problems at their efforts, in their order.

    Args:
        source: where they come from, for messages: a file, or names of environments.
        pairs: problems and efforts.
    """
    rows = (json.dumps([p.environment, p.messages, p.tools, p.answer, effort], sort_keys=True) for p, effort in pairs)
    return Identity(source, {"problems": text_hash(*rows)})


def names_of(environments: Sequence[Environment]) -> str:
    """Return the names of environments as the source of problems."""
    return "environments " + ", ".join(environment.name for environment in environments)
