"""One evaluation of a scoring run: on the parent, then on the parent with each candidate in place, a file for each.

In memory, a candidate is swapped into the loaded parent, and all processes score their share of the items. By an engine
(the evaluation's own setting), the first process writes the parent with the candidate in it as a checkpoint folder and
starts the engine, or engines, on it in processes of their own, while the others wait; the parent need not be in memory.

Reads the parent's folder and the library's; writes a file of scores for each candidate, and one checkpoint folder at a
time. With an engine, for a parent of P bytes and C candidates: disk P; traffic 2 P C, and the engine's start C times.
Source: arXiv 2602.11937 section 4 (AA-LCR accuracy with one layer replaced).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from lightning.fabric import Fabric
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_puzzle.child.child import Child
from lit_puzzle.generation.apart import engines_apart, free_share
from lit_puzzle.generation.sampling import EngineSettings
from lit_puzzle.library.library import parent_blocks
from lit_puzzle.library.swap import swapped
from lit_puzzle.model.blocks import PuzzleModel
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.layout import layer_prefix
from lit_puzzle.scoring.evaluations import (
    SCORE,
    ByEngine,
    Evaluation,
    by_effort,
    check_values,
    item_tokens,
    measuring,
    score_items,
)
from lit_puzzle.scoring.evidence import changed_window, changes_experts, item_share, unjudged
from lit_puzzle.scoring.score_files import COULD_TELL, PARENT_FILE, Entry, ScoreFiles, Values
from lit_puzzle.spec import Plan

FOLDER = "candidate"  # in the run folder: what the engine reads
Score = Callable[[Entry | None], Values]  # the values of every item with an entry in place; None: the parent itself
Trained = Callable[[Entry], dict[str, Tensor]]  # the trained tensors of an entry, by their names inside its layer


def engine_of(evaluation: Evaluation) -> EngineSettings | None:
    """Return the engine that an evaluation asks for; None: the parent in memory."""
    return evaluation.engine if isinstance(evaluation, ByEngine) else None


@dataclass(frozen=True)
class EvaluationRun:
    """An evaluation, and where its scores go.

    Attributes:
        evaluation: the evaluation.
        items: its items.
        files: of its scores.
        tokenizer: the parent's.
        processes: of the run; all of them call every method.
    """

    evaluation: Evaluation
    items: Sequence[Any]
    files: ScoreFiles
    tokenizer: PreTrainedTokenizerBase
    processes: Fabric

    def measure_parent(self, score: Score) -> None:
        """Run the evaluation on the parent, unless its file is there."""
        if not self.processes.broadcast(self.files.has(PARENT_FILE)):
            self._write(PARENT_FILE, score(None))

    def measure(self, score: Score, entries: Sequence[Entry]) -> None:
        """Run the evaluation with each of the entries in place."""
        tokens, name = item_tokens(self.evaluation, self.tokenizer, self.items), self.evaluation.name
        told: dict[Entry, float] = {}
        if tokens is not None:
            told = {entry: item_share(tokens, changed_window(entry)) for entry in entries if not changes_experts(entry)}
        if words := unjudged(told, f"items of {name}"):
            self.processes.print(words, flush=True)
        for number, entry in enumerate(entries, 1):
            share = {COULD_TELL: [told[entry]]} if entry in told else {}
            if told.get(entry) == 0:
                self._write(entry.file_name, share)
                continue
            values = score(entry)
            self._write(entry.file_name, values | share)
            mean = sum(values[SCORE]) / len(values[SCORE])
            line = f"{number}/{len(entries)}: layer {entry.layer}, {entry.name}: {name} {mean:.3f}"
            self.processes.print(line, flush=True)

    def _write(self, name: str, values: Values) -> None:
        if self.processes.is_global_zero:
            self.files.write(name, values)

    def in_memory(self, model: PuzzleModel, trained: Trained, unshard: bool) -> Score:
        """Return how the loaded parent is scored.

        Args:
            model: the parent.
            trained: the trained tensors of an entry.
            unshard: whether sharded weights are gathered once for all items.
        """

        def score(entry: Entry | None) -> Values:
            own = nullcontext() if entry is None else swapped(model, entry.layer, entry.block, trained(entry))
            with own:
                values = score_items(model, self.tokenizer, self.evaluation, self.items, self.processes, unshard)
            return by_effort(self.evaluation, self.items, values)

        return score

    def by_engine(self, settings: EngineSettings, parent: Path, run_dir: Path, trained: Trained) -> Score:
        """Return how an engine scores folders.

        Args:
            settings: of the engine.
            parent: folder of the parent.
            run_dir: run folder; gets a checkpoint folder while a candidate is scored.
            trained: the trained tensors of an entry.
        """

        def score(entry: Entry | None) -> Values:
            free, values = free_share(), Values()
            if self.processes.is_global_zero:
                with candidate_folder(parent, run_dir / FOLDER, entry, trained) as folder:
                    values = self._score_folder(settings, folder, free)
            return dict(self.processes.broadcast(values))

        return score

    def _score_folder(self, settings: EngineSettings, folder: Path, free: float | None) -> Values:
        assert isinstance(self.evaluation, ByEngine)
        with engines_apart(settings, folder, free) as engine:
            measured = measuring(self.evaluation)
            if measured is None:
                values: Values = {SCORE: list(self.evaluation.scores_by_engine(engine, self.tokenizer, self.items))}
            else:
                values = measured.values_by_engine(engine, self.tokenizer, self.items)
        check_values(self.evaluation, values, len(self.items))
        return by_effort(self.evaluation, self.items, values)


@contextmanager
def candidate_folder(parent: Path, folder: Path, entry: Entry | None, trained: Trained) -> Iterator[Path]:
    """Provide a checkpoint folder of the parent with an entry in place, which is removed afterwards.

    Args:
        parent: folder of the parent.
        folder: to write.
        entry: what replaces its layer; None: the parent's own folder is provided.
        trained: the trained tensors of an entry.

    Raises:
        ValueError: a trained tensor that the parent holds in another form.
    """
    if entry is None:
        yield parent
        return
    rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir()
    try:
        write_candidate(parent, folder, entry, trained(entry))
        yield folder
    finally:
        rmtree(folder)


def write_candidate(parent: Path, folder: Path, entry: Entry, trained: dict[str, Tensor]) -> None:
    """Write the parent with one block replaced into an empty folder, its trained tensors in the parent's dtypes."""
    checkpoint = Checkpoint(parent)
    blocks = parent_blocks(checkpoint.config)
    blocks[entry.layer] = entry.block
    experts = max(count for count, _ in checkpoint.blocks)
    child = Child(checkpoint, Plan(checkpoint.fingerprint(), experts, tuple(blocks)))
    for name, tensor in trained.items():
        if layer_prefix(entry.layer) + name not in checkpoint.tensors:
            raise ValueError(
                f"{entry.name} of layer {entry.layer} has a trained {name}, which {parent} holds in another form. "
                "Leave the evaluation's engine out."
            )
        child.trained[layer_prefix(entry.layer) + name] = tensor
    child.write(folder)
