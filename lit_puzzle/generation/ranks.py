"""The processes of a run, as engines of rollouts see them. Reads and writes nothing."""

from dataclasses import dataclass
from typing import Any

from torch import distributed


@dataclass(frozen=True)
class Ranks:
    """The processes of a run.

    Attributes:
        rank: of this process.
        size: number of processes.
        local_rank: of this process on its machine.
        local_size: processes of a machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def gather(self, own: Any) -> list[Any]:
        """Return what every process gives; all must call it."""
        if self.size == 1:
            return [own]
        everybody: list[Any] = [None] * self.size
        distributed.all_gather_object(everybody, own)
        return everybody


ALONE = Ranks()
