"""The corpus: tables of hostile inputs, one file a kind of input."""

from collections.abc import Sequence

from faults.case import Case
from faults.cases import (
    adapters,
    chains,
    checkpoints,
    configs,
    documents,
    folders,
    prompts,
    recipes,
    switches,
    templates,
    training,
    values,
)

TABLES: dict[str, Sequence[Case]] = {
    "checkpoints": checkpoints.CASES,
    "values": values.CASES,
    "configs": configs.CASES,
    "switches": switches.CASES,
    "templates": templates.CASES,
    "recipes": recipes.CASES,
    "prompts": prompts.CASES,
    "documents": documents.CASES,
    "chains": chains.CASES,
    "adapters": adapters.CASES,
    "training": training.CASES,
    "folders": folders.CASES,
}
CORPUS = [case for table in TABLES.values() for case in table]
