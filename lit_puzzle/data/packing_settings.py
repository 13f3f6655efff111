"""Settings of packed documents, as recipes hold them: which documents, and how they are packed. Imports no torch."""

from dataclasses import dataclass
from typing import Literal, get_args

PackingMethod = Literal["first_fit", "sequential"]
LongDocuments = Literal["refuse", "cut"]
WrittenBy = Literal["parent", "any"]


@dataclass(frozen=True)
class DocumentFilter:
    """Which documents count.

    Args:
        efforts: only documents of these reasoning efforts; None: all.
        environments: only documents of these environments; None: all.
        only_correct: only documents with a verified right answer.
        written_by: `parent` refuses documents of another model than the parent, or the one that a child was made from;
            `any` takes those of any model with the same tokenizer.

    Raises:
        ValueError: another value of `written_by`.
    """

    efforts: list[str] | None = None
    environments: list[str] | None = None
    only_correct: bool = False
    written_by: WrittenBy = "parent"

    def __post_init__(self) -> None:
        if self.written_by not in get_args(WrittenBy):
            raise ValueError(f"filter.written_by is {self.written_by!r}; allowed: {list(get_args(WrittenBy))}.")


@dataclass(frozen=True)
class PackingSettings:
    """How documents are placed into sequences of one length.

    Args:
        method: `first_fit` places a document into the first sequence with room for it; `sequential` keeps the order.
        long_documents: `refuse` stops on a document that is longer than a sequence, `cut` drops its end.

    Raises:
        ValueError: another value.
    """

    method: PackingMethod = "first_fit"
    long_documents: LongDocuments = "refuse"

    def __post_init__(self) -> None:
        choices = (("method", self.method, PackingMethod), ("long_documents", self.long_documents, LongDocuments))
        for name, given, allowed in choices:
            if given not in get_args(allowed):
                raise ValueError(f"packing.{name} is {given!r}; allowed: {list(get_args(allowed))}.")
