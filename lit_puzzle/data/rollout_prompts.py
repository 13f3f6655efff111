"""Batches of training prompts from which a model samples while it trains; resumable at every batch.

Order: each epoch shuffles the prompts by (seed, epoch). A rollout of B completions per batch, S batches and R processes
takes the next G = B S R prompts of that order; batch s of process r takes the ones from (s R + r) B on. So the prompts
of a rollout depend neither on the number of processes nor on how it is cut into batches, and neither do completions:
each is drawn with random numbers of its own, numbered over the whole run. Prompts that fill no whole rollout are left
out of their epoch.

Reads and writes nothing. Memory: the prompts.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lit_puzzle.environments.environment import PromptAtEffort


@dataclass(frozen=True)
class RolloutPrompts:
    """What one process samples from in a rollout, and which batch of it is next.

    Attributes:
        pairs: the process's prompts, batch after batch.
        rows: number of each completion in the run.
        batch: index of the batch in the rollout, 0 where completions are to be sampled.
        batch_size: prompts of a batch.
    """

    pairs: Sequence[PromptAtEffort]
    rows: Sequence[int]
    batch: int
    batch_size: int

    @property
    def span(self) -> slice:
        """The batch's place in `pairs`."""
        return slice(self.batch * self.batch_size, (self.batch + 1) * self.batch_size)


class RolloutBatches:
    """One process's batches.

    Args:
        pairs: all training prompts.
        batch_size: prompts of a batch.
        batches: batches of a rollout.
        rank: of this process.
        processes: number of processes.
        seed: of the order.

    Attributes:
        position: number of batches yielded since the run began.

    Raises:
        ValueError: fewer prompts than a rollout needs.
    """

    def __init__(
        self, pairs: Sequence[PromptAtEffort], batch_size: int, batches: int, rank: int, processes: int, seed: int
    ) -> None:
        self.pairs, self.batch_size, self.batches = pairs, batch_size, batches
        self.rank, self.processes, self.seed = rank, processes, seed
        self.together = batch_size * batches * processes
        self.position = 0
        if len(pairs) < self.together:
            raise ValueError(
                f"{len(pairs)} training prompts were given; one rollout of {batch_size} completions x {batches} "
                f"batches x {processes} processes needs {self.together}."
            )

    def __len__(self) -> int:
        return len(self.pairs) // self.together * self.batches

    def check_updates(self, accumulate_grad_batches: int) -> None:
        """Check that an epoch contains whole updates.

        Raises:
            ValueError: it does not.
        """
        if len(self) % accumulate_grad_batches:
            raise ValueError(
                f"An epoch of {len(self)} batches does not contain whole updates of trainer.accumulate_grad_batches="
                f"{accumulate_grad_batches}. Make on_policy.steps_per_generation ({self.batches}) a multiple of it."
            )

    def __iter__(self) -> Iterator[RolloutPrompts]:
        """Yield the rest of an epoch; `position` is read when the first batch is requested."""
        epoch, offset = divmod(self.position, len(self))
        order = list(range(len(self.pairs)))
        random.Random(f"rollouts {self.seed} {epoch}").shuffle(order)
        for step in range(offset, len(self)):
            rollout, batch = divmod(step, self.batches)
            places = self._places()
            chosen = [self.pairs[order[rollout * self.together + place]] for place in places]
            first = (epoch * (len(self) // self.batches) + rollout) * self.together
            self.position += 1
            yield RolloutPrompts(chosen, [first + place for place in places], batch, self.batch_size)

    def _places(self) -> list[int]:
        """Return this process's places among the prompts of a rollout."""
        starts = [(batch * self.processes + self.rank) * self.batch_size for batch in range(self.batches)]
        return [start + i for start in starts for i in range(self.batch_size)]

    def state_dict(self) -> dict[str, int]:
        """Return the position, which is the same on all processes, and the prompts of a rollout."""
        return {"position": self.position, "together": self.together, "batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a saved position.

        Raises:
            ValueError: rollouts of another size.
        """
        if (state["together"], state["batches"]) != (self.together, self.batches):
            raise ValueError(
                f"The checkpoint was made with rollouts of {state['together']} completions in {state['batches']} "
                f"batches; now they are {self.together} in {self.batches}. Resume with the same completions_per_device "
                "x steps_per_generation x processes."
            )
        self.position = state["position"]
