"""A loader that resumes: hands out the batches of another loader from any position, and never disturbs its randomness.

`position` counts the batches handed out since the run began. An epoch that is entered in its middle (a resumed run)
must not draw random numbers that the first run had drawn at that epoch's beginning, so skipping runs on a copy of the
random state. Loaders whose sampler shuffles with its own generator advance it once per epoch: epochs that a resumed
run never sees are opened and left.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Batches(Protocol):
    """What the wrapped loader must be: sized, and a new epoch at every iteration."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class ResumableLoader:
    """Wraps a loader of a known length; iterating continues at `position`.

    Args:
        make: builds the wrapped loader in its initial state (its sampler freshly seeded).
        stream: context in which the first batch of an epoch is drawn when the epoch starts at its beginning.
        fork: context in which batches are skipped; leaves the random state as it was.
    """

    def __init__(
        self,
        make: Callable[[], Batches],
        stream: Callable[[], AbstractContextManager[None]],
        fork: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._make, self._stream, self._fork = make, stream, fork
        self._loader = make()
        self._opened = 0  # epochs that the wrapped loader has begun
        self.position = 0

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        """One epoch (what is left of it), evaluated lazily: `position` is read when the first batch is asked for."""
        epoch, offset = divmod(self.position, len(self))
        batches = self._open(epoch, offset)
        for batch in batches:
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position, in batches."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues at a saved position."""
        self.position = state["position"]

    def _open(self, epoch: int, offset: int) -> Iterator[Any]:
        if self._opened > epoch:
            self._loader, self._opened = self._make(), 0
        with self._fork():
            for _ in range(epoch - self._opened):
                next(iter(self._loader))
        self._opened = epoch + 1
        with self._stream() if offset == 0 else self._fork():
            batches = iter(self._loader)
            first = [next(batches) for _ in range(offset + 1)][-1]
        yield first
        yield from batches
