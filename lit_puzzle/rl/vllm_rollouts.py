"""What TRL calls where vLLM generates: the engine of `lit_puzzle.generation.rollout_engine` in TRL's own interface.

Completions are drawn with random numbers of (seed, row, position), row = (slice, process, place in the batch): they do
not depend on how vLLM batches them, and a resumed run draws what the uninterrupted one draws.
Reads and writes nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_puzzle.child.trained import trained_tensors
from lit_puzzle.generation.engine import Completion
from lit_puzzle.generation.rollout_engine import RolloutEngine, Trained
from lit_puzzle.generation.route_replay import RouteReplay
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.model.loading import DtypeName
from lit_puzzle.rl.settings import GRPOSettings, RolloutSampling
from lit_puzzle.training.rollouts import call_together, start_engine
from lit_puzzle.training.trainable import without_adapters

Weights = Callable[[], Mapping[str, Trained]]
Generated = tuple[list[list[int]], list[list[int]], list[list[list[float]]], None]


def start_rollouts(
    grpo: GRPOSettings, child: Path, trainer: Trainer, dtype: DtypeName, policy: Any
) -> "VLLMRollouts | None":
    """Start the engine that the settings name; None where the policy generates.

    Args:
        grpo: settings of the run.
        child: folder that training started from.
        trainer: the run's Trainer.
        dtype: of the policy's weights.
        policy: the model as it trains, with its adapters.

    Raises:
        ValueError: the engine does not start.
    """
    engine = start_engine(grpo.rollouts, child, trainer, dtype, grpo.sampling.temperature)
    if engine is None:
        return None
    model = without_adapters(policy)
    replay = RouteReplay(policy, model) if grpo.rollouts.replay_routes else None
    return VLLMRollouts(engine, grpo.sampling, lambda: trained_tensors(model), replay)


class VLLMRollouts:
    """An engine as TRL's trainer uses it (trl 1.16: `VLLMGeneration`).

    Args:
        engine: beside the model that trains.
        sampling: how completions are drawn.
        weights: returns the tensors that training changes.
        replay: of routes, in the policy; None: its own routers choose.

    Attributes:
        slices: returns how many slices of generation batches were used so far; the trainer's.
        sent_bytes: of the weights in the last update of the engine.
        bound: largest allowed mean difference of log-probabilities.
    """

    def __init__(
        self, engine: RolloutEngine, sampling: RolloutSampling, weights: Weights, replay: RouteReplay | None = None
    ) -> None:
        self.engine, self._weights, self.replay = engine, weights, replay
        self._sampling = Sampling(
            sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.seed, logprobs=True
        )
        self.slices: Callable[[], int] = lambda: 0
        self.bound = engine.settings.mismatch_bound(engine.dtype)
        self.sent_bytes, self._has_folder = 0, False

    def sync_weights(self) -> None:
        """Give the engine the policy's weights."""
        self.sent_bytes = call_together(lambda: self.engine.update(self._weights()))

    def current_engine(self) -> RolloutEngine:
        """Return the engine with the policy's weights, or those of the folder that it has read."""
        if not self._has_folder:
            self.sync_weights()
        return self.engine

    def read_folder(self, folder: Path) -> None:
        """Give the engine the weights of a folder, to stay."""
        call_together(lambda: self.engine.read_folder(folder))
        self._has_folder = True

    def generate(self, prompts: Sequence[Sequence[int]], num_generations: int, **_: Any) -> Generated:
        """Return prompts, completions, the log-probability of each of their tokens, and None.

        Args:
            prompts: token ids of each completion's prompt, on this process.
            num_generations: not read: every completion has its prompt.

        Raises:
            EngineFailedError: the engine of one process failed; raised on all.
        """
        ranks = self.engine.ranks
        first = (self.slices() * ranks.size + ranks.rank) * len(prompts)
        rows = range(first, first + len(prompts))
        completions = call_together(lambda: self.engine.generate(prompts, self._sampling, rows))
        if self.replay is not None:
            routes = call_together(lambda: routes_of(completions))
            pairs = zip(prompts, completions, strict=True)
            self.replay.remember([[*ids, *completion.token_ids] for ids, completion in pairs], routes)
        logprobs = [[[number] for number in completion.logprobs or ()] for completion in completions]
        return [list(ids) for ids in prompts], [completion.token_ids for completion in completions], logprobs, None

    def state(self) -> list[Any]:
        """Return the routes of the completions that are still to be trained on."""
        return [] if self.replay is None else self.replay.state()

    def load_state(self, state: list[Any]) -> None:
        """Continue with saved routes."""
        if self.replay is not None:
            self.replay.load_state(state)


def routes_of(completions: Sequence[Completion]) -> list[Tensor]:
    """Return the routes of completions.

    Raises:
        ValueError: one has none.
    """
    if any(completion.routes is None for completion in completions):
        raise ValueError(
            "vLLM returned completions without routes; rollouts.replay_routes needs vLLM 0.32 or 0.33, on a GPU."
        )
    return [torch.from_numpy(np.asarray(completion.routes, dtype=np.int16)) for completion in completions]
