"""What is checked of rollouts by vLLM: the settings, before anything slow, and every answer of an engine.

Reads config.json of the checkpoint; writes nothing.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from lit_puzzle.generation.engine import Completion
from lit_puzzle.generation.ranks import Ranks
from lit_puzzle.generation.rollout_settings import RolloutSettings
from lit_puzzle.generation.wire import SERVERS, key_from_environment, servers_from_environment
from lit_puzzle.model.family import is_child
from lit_puzzle.run.files import read_json


def check_rollouts(settings: RolloutSettings, folder: Path, ranks: Ranks) -> None:
    """Check settings that name vLLM or servers, before anything slow.

    Args:
        settings: of rollouts.
        folder: checkpoint of the model that trains.
        ranks: the processes.

    Raises:
        ValueError: a folder whose weights vLLM cannot read again, processes that do not fill whole engines, or no
            key for servers.
    """
    if settings.engine == "transformers":
        return
    if not is_child(read_json(folder / "config.json")):
        raise ValueError(
            f"rollouts.engine: {settings.engine} was given; {folder} is no child, and vLLM's own loader keeps "
            "old experts and sinks when it reads new weights. Assemble it with a plan, or use engine transformers."
        )
    if settings.engine == "server":
        key_from_environment()
        servers = servers_from_environment()
        if ranks.size % len(servers):
            raise ValueError(
                f"{SERVERS} names {len(servers)}; their number must divide the {ranks.size} processes of the run."
            )
    if ranks.local_size % settings.tensor_parallel:
        raise ValueError(
            f"rollouts.tensor_parallel {settings.tensor_parallel} was given; it must divide the {ranks.local_size} "
            "processes of a machine."
        )
    if settings.replay_routes and not torch.cuda.is_available():
        raise ValueError(
            "rollouts.replay_routes: true was given; vLLM returns routes only from its Model Runner V2, which needs "
            "Triton, so a GPU. Leave it out on a CPU."
        )
    if settings.tensor_parallel > 1 and not torch.cuda.is_available():
        raise ValueError(
            f"rollouts.tensor_parallel {settings.tensor_parallel} was given; it is for GPUs. On a CPU every process "
            "has its engine."
        )


def check_answers(completions: Sequence[Completion], expected: int, name: str) -> None:
    """Check that an engine answered every prompt, with tokens whose log-probabilities, if any, are finite.

    Raises:
        ValueError: it did not.
    """
    if len(completions) != expected:
        raise ValueError(f"{name} answered {len(completions)} of {expected} prompts. The same command resumes.")
    for place, completion in enumerate(completions):
        if not completion.token_ids:
            raise ValueError(f"{name} generated no token for prompt {place}. The same command resumes.")
        logprobs = completion.logprobs
        wrong = [number for number in logprobs or () if not -float("inf") < number <= 1e-3]
        if wrong:
            raise ValueError(
                f"{name} gave prompt {place} the log-probability {wrong[0]:g}; expected are finite numbers of at most "
                "0: its weights or its KV cache are damaged. The same command resumes; rollouts.dtype: float32 is the "
                "exact one."
            )
