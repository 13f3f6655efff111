"""A rollout of on-policy distillation: what was sampled, kept until all of its batches have been trained on.

Reads and writes nothing. Memory: the token ids. Shapes: L levels of effort.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_puzzle.environments.chat_template import render_prompt
from lit_puzzle.environments.environment import LEVELS, PromptAtEffort
from lit_puzzle.environments.looping import is_looping
from lit_puzzle.generation.engine import Completion
from lit_puzzle.training.random_state import RandomState, get_random_state, of_all_processes


@dataclass(frozen=True)
class Rollout:
    """The completions of one process.

    Attributes:
        prompts: token ids of each prompt.
        completions: of these prompts.
        mean_tokens: completion tokens of a batch, mean over the batches of all processes.
    """

    prompts: list[list[int]]
    completions: list[Completion]
    mean_tokens: float

    def state(self) -> dict[str, Any]:
        """Return it as plain Python, for a checkpoint."""
        return asdict(self)

    @staticmethod
    def of(state: dict[str, Any]) -> "Rollout":
        """Return the rollout of a saved state."""
        completions = [Completion(**values) for values in state["completions"]]
        return Rollout(state["prompts"], completions, state["mean_tokens"])


def state_of_all(device: torch.device, rollout: Rollout | None, losses: Sequence[float]) -> list[Any]:
    """Return what a checkpoint holds of every process: random state, rollout, losses. Every process must call it."""
    state = None if rollout is None else rollout.state()
    return of_all_processes({"random": get_random_state(device), "rollout": state, "losses": list(losses)})


def own_state(saved: Sequence[Any], rank: int, processes: int) -> tuple[RandomState, Rollout | None, list[float]]:
    """Return this process's random state, rollout and losses of a checkpoint.

    Raises:
        ValueError: a checkpoint of another number of processes.
    """
    if len(saved) != processes:
        raise ValueError(
            f"The checkpoint was written by {len(saved)} processes, this run has {processes}. Resume with the same "
            "trainer.devices and num_nodes, or start again with --overwrite."
        )
    own = saved[rank]
    return own["random"], None if own["rollout"] is None else Rollout.of(own["rollout"]), list(own["losses"])


def totals_of(pairs: Sequence[PromptAtEffort], completions: Sequence[Completion]) -> Tensor:
    """Return sums over this process in float64: completions, tokens, cut off, looping (columns) at each of `LEVELS`."""
    sums_L4 = torch.zeros(len(LEVELS), 4, dtype=torch.float64)
    for (_, effort), completion in zip(pairs, completions, strict=True):
        ids, is_cut = completion.token_ids, completion.finish == "length"
        sums_L4[LEVELS.index(effort)] += torch.tensor([1, len(ids), is_cut, is_looping(ids)], dtype=torch.float64)
    return sums_L4


def means_of(sums_L4: Tensor) -> dict[str, float]:
    """Return mean tokens and shares of all completions, and mean tokens of the efforts that have some."""
    count, *totals = sums_L4.sum(0).tolist()
    means = {name: total / count for name, total in zip(("tokens", "unfinished", "looping"), totals, strict=True)}
    rows = zip(LEVELS, sums_L4.tolist(), strict=True)
    return means | {f"tokens/{effort}": tokens / number for effort, (number, tokens, *_) in rows if number > 0}


def described(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PromptAtEffort], completions: Sequence[Completion]
) -> dict[str, Any]:
    """Return what `GenerationLength` and `RolloutSamples` read of a rollout."""
    return {
        "completion_lengths": torch.tensor([len(completion.token_ids) for completion in completions]),
        "truncated": torch.tensor([completion.finish == "length" for completion in completions]),
        "effort": [effort for _, effort in pairs],
        "environment": [problem.environment for problem, _ in pairs],
        "prompt": [render_prompt(tokenizer, problem, effort) for problem, effort in pairs],
        "answer": [problem.answer for problem, _ in pairs],
        "completion_ids": [completion.token_ids for completion in completions],
    }
