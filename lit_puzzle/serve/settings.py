"""Settings of the export, as recipes hold them: storage, model card, upload. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Format = Literal["puzzle", "stock", "masked"]
Experts = Literal["stored", "plain", "mxfp4"]
Dtype = Literal["stored", "bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Storage:
    """How an exported child is stored.

    Args:
        format: `puzzle` has a number of experts and a window for each layer; `stock` is the parent's architecture, for
            children that it can represent; `masked` is the parent's architecture with the removed experts masked, for
            checking engines.
        experts: `stored` keeps the experts as they are stored; `plain` unpacks MXFP4; `mxfp4` packs plain experts.
        mxfp4_parent: with `experts: mxfp4`, folder of an MXFP4 parent: experts with unchanged values get its bytes.
        dtype: dtype of all tensors but packed experts and KV scales; `stored` keeps each tensor's own.
    """

    format: Format = "puzzle"
    experts: Experts = "stored"
    mxfp4_parent: Path | None = None
    dtype: Dtype = "stored"


@dataclass(frozen=True)
class Card:
    """What the model card says that cannot be read from the folder.

    Args:
        name: title of the card.
        parent: the model that was pruned; a name on the Hugging Face hub (OWNER/NAME) becomes `base_model`.
        license: license of the parent, as the hub abbreviates it (`apache-2.0`); it applies to the child.
        training: run folders of the training runs, in order; None: those that have led to the weights, as the run
            folders say.
        evaluations: column title -> run folder of an evaluation.
        remarks: sentences for the section on limits.
    """

    name: str = "A child of gpt-oss"
    parent: str = "unknown"
    license: str = "unknown"
    training: list[Path] | None = None
    evaluations: dict[str, Path] = field(default_factory=dict)
    remarks: str = ""


@dataclass(frozen=True)
class Upload:
    """Where the complete folder is uploaded.

    Args:
        repository: OWNER/NAME on the Hugging Face hub; None: no upload.
        private: whether the repository is private if the upload creates it.
    """

    repository: str | None = None
    private: bool = True
