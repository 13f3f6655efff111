"""A loader that resumes: yields the batches of another loader from any position, with the same random numbers.

`position` counts the batches since the run began. A run that resumes in the middle of an epoch must not draw the random
numbers that the uninterrupted run drew at the beginning of that epoch, so batches are skipped on a copy of the random
state. A sampler that shuffles with its own generator advances it once per epoch; so earlier epochs are started too, and
abandoned at their first batch. Reads and writes nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Batches(Protocol):
    """A loader with a length, which starts a new epoch at every iteration."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class ResumableLoader:
    """A loader that continues another one at `position`.

    Args:
        make: builds the wrapped loader in its initial state (its sampler freshly seeded).
        stream: context in which the first batch of an epoch is drawn when the epoch starts at its beginning.
        fork: context in which batches are skipped; it restores the random state.

    Attributes:
        position: number of batches yielded since the run began.
    """

    def __init__(
        self,
        make: Callable[[], Batches],
        stream: Callable[[], AbstractContextManager[None]],
        fork: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._make, self._stream, self._fork = make, stream, fork
        self._loader = make()
        self._opened = 0  # epochs that the wrapped loader has started
        self.position = 0

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        """Yield the rest of an epoch; `position` is read when the first batch is requested."""
        epoch, offset = divmod(self.position, len(self))
        batches = self._open(epoch, offset)
        for batch in batches:
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position, in batches."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a saved position."""
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
