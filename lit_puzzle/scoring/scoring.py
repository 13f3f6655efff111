"""The stage `score`: how much each candidate of a library damages the parent when it alone is put into it.

Reads the parent, its library, and calibration data; writes `scores.json` (`lit_puzzle.scoring.scores`, which defines
the metrics) and, as it goes, one file per finished candidate (`lit_puzzle.scoring.score_files`): the same command again
goes on after the last of them. Candidates with trained tensors are scored with these.

Damage is looked at where the parent writes: from the last token of its prompt on, where the data says which that is.

Scored apart (default), a candidate is its halves, `experts=N` and `window=W`, whose damages the search adds; as pairs,
every candidate of the library has its own row. Evaluations (long-context accuracy) are run on the parent first, so that
what is wrong with one shows at once, and on window rows at the end, with the candidate in the whole model.

Memory: the parent's share (`lit_puzzle.training.fabric`) + one set of hidden states, whatever the number of
layers and candidates (formula in `lit_puzzle.scoring.replace_block`). Time: sum over candidates of (L - l) / L
forward passes of the data, l of L the layer; + 1 generation per evaluation and row. Source: arXiv 2602.11937 section 4,
arXiv 2411.19146.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from lightning.fabric import Fabric
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_puzzle.data.calibration import CALIBRATION_FILE, CalibrationData
from lit_puzzle.library.library import Library
from lit_puzzle.library.swap import check_trained, swapped
from lit_puzzle.library.trained_blocks import block_tensors
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.model.gpt_oss import GptOssPuzzleForCausalLM
from lit_puzzle.run.folder import require_input
from lit_puzzle.scoring.block_quality import METRICS
from lit_puzzle.scoring.evaluations import Evaluation, answer_items, task_items
from lit_puzzle.scoring.replace_block import Memory, ReplaceOneBlock, lay_out
from lit_puzzle.scoring.score_files import Entry, ScoreFiles, check_finite, claim_inputs, entries_of
from lit_puzzle.scoring.score_table import MEAN_RANK, score_table
from lit_puzzle.scoring.scores import Scores
from lit_puzzle.training.fabric import FabricSettings, launch, load_parent, sum_over_processes

PARENT_FILE = "parent.json"
SCRATCH_FILE = "hidden_states"


def score(
    run_dir: Path,
    parent: Path,
    library: Path,
    data: CalibrationData,
    fabric: FabricSettings = FabricSettings(),  # noqa: B008  (frozen)
    memory: Memory = Memory(),  # noqa: B008
    score_prompts: bool = False,
    pairs: bool = False,
    evaluations: list[Evaluation] | None = None,
    evaluate: Literal["windows", "all"] = "windows",
    rank_samples: int = 64,
    seed: int = 0,
) -> dict[str, float]:
    """Score every candidate of a library.

    Args:
        run_dir: Run folder; gets `scores.json`.
        parent: Checkpoint folder.
        library: Folder of the parent's library.
        data: The sequences; those that the parent writes are written once, into the run folder.
        fabric: Devices, precision, sharding.
        memory: What may be kept in memory.
        score_prompts: Score the tokens of prompts too, which the parent may never have learned to predict.
        pairs: Score combinations of experts and window as such, instead of adding their halves.
        evaluations: Tasks whose accuracy drop is one more metric.
        evaluate: Rows the evaluations are run on: those that change the window only, or all.
        rank_samples: Sequences, drawn by `seed`, over which ranks are averaged (all, if there are fewer).
        seed: Of that draw.

    Returns:
        Samples, tokens, rows, and the largest damage in each metric; nothing on processes other than the first.

    Raises:
        ValueError: Parent, library and data do not belong together, too few sequences, or a damage that is not finite.
    """
    parent, library = require_input(parent, "parent checkpoint"), require_input(library, "block library")
    candidates, tasks = Library.load(library), evaluations or []
    _check(parent, candidates, library, data, tasks, rank_samples)
    entries = entries_of(candidates, pairs)
    run = _Run(run_dir, parent, library, candidates, fabric, launch(fabric))
    rows = {task.name: [e for e in entries if evaluate == "all" or e.name.startswith("window=")] for task in tasks}
    unscored = run.unfinished(run.blocks, entries)
    unanswered = {name: run.unfinished(run.evaluation(name), rows[name]) for name in rows}
    # Every task is tried on the parent before the blocks: what is wrong with one must not show after days of scoring.
    unanswered_items = [(task, run.items(task)) for task in tasks if unanswered[task.name]]
    batches, prompts = run.sequences(data, score_prompts)
    if unscored or unanswered_items:
        model = load_parent(run.processes, fabric, parent)
        for task, items in unanswered_items:
            run.ask_parent(model, task, items)
        run.score_blocks(model, batches, prompts, unscored, memory)
        for task, items in unanswered_items:
            run.evaluate(model, task, items, unanswered[task.name])
    if not run.processes.is_global_zero:
        return {}
    samples = sum(len(batch) for batch in batches)
    chosen = sorted(random.Random(seed).sample(range(samples), min(rank_samples, samples)))
    answers = {name: (run.evaluation(name), rows[name]) for name in rows}
    table = score_table(run.blocks, entries, chosen, answers, PARENT_FILE)
    tokens = sum(int(part.batch["scored_mask"].sum()) for part in lay_out(batches, 0, 1, prompts))
    scores = Scores(candidates.parent_fingerprint, samples, tokens, table)
    scores.check_library(candidates)
    scores.save(run_dir)
    print_scores(scores, ["kl", *rows])
    return _summary(scores)


class _Run:
    """What every step of one scoring run needs."""

    def __init__(
        self, run_dir: Path, parent: Path, folder: Path, library: Library, settings: FabricSettings, processes: Fabric
    ) -> None:
        self.run_dir, self.parent, self.folder, self.library = run_dir, parent, folder, library
        self.settings, self.processes = settings, processes
        self.blocks = ScoreFiles(run_dir / "candidates")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The parent's; only evaluations need it."""
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.parent)
        return tokenizer

    def evaluation(self, name: str) -> ScoreFiles:
        """The files of one evaluation."""
        return ScoreFiles(self.run_dir / "evaluations" / name)

    def sequences(self, data: CalibrationData, score_prompts: bool) -> tuple[list[list[list[int]]], list[list[int]]]:
        """The batches of all processes and their prompts' tokens (0 to score all), the same whenever the run goes on.

        Raises:
            ValueError: Fewer than two sequences, or other inputs than those the run was started with.
        """
        if self.processes.is_global_zero and not (self.run_dir / CALIBRATION_FILE).is_file():
            data.write_sequences(self.run_dir, str(self.processes.device))
        self.processes.barrier()
        batches = data.read_batches(self.run_dir)
        prompts = [[0] * len(batch) for batch in batches] if score_prompts else data.prompt_lengths(self.run_dir)
        if sum(len(batch) for batch in batches) < 2:
            raise ValueError("one sequence was given; a standard error needs two. Give more calibration data.")
        library = json.dumps(self.library.to_json(), sort_keys=True)
        inputs = {
            "parent": self.library.parent_fingerprint,
            "library": hashlib.sha256(library.encode()).hexdigest(),
            "sequences": hashlib.sha256(json.dumps([batches, prompts]).encode()).hexdigest(),
        }
        for candidate in (candidate for layer in self.library.layers for candidate in layer if candidate.weights):
            file = self.folder / str(candidate.weights)
            with file.open("rb") as stream:
                inputs[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        claim_inputs(self.run_dir, inputs, self.processes.is_global_zero)
        return batches, prompts

    def unfinished(self, files: ScoreFiles, entries: Sequence[Entry]) -> list[Entry]:
        """Those that have no file yet, as the first process sees it."""
        return self.processes.broadcast([entry for entry in entries if not files.has(entry.file_name)])

    def score_blocks(
        self,
        model: GptOssPuzzleForCausalLM,
        batches: Sequence[Sequence[Sequence[int]]],
        prompts: Sequence[Sequence[int]],
        entries: Sequence[Entry],
        memory: Memory,
    ) -> None:
        """Scores the entries, which are in the order of the layers."""
        rank, world_size = self.processes.global_rank, self.processes.world_size
        scratch = self.run_dir / f"{SCRATCH_FILE}.{rank}"
        scratch.unlink(missing_ok=True)  # of a killed run
        if not entries:
            return
        parts, samples = lay_out(batches, rank, world_size, prompts), sum(len(batch) for batch in batches)
        scorer = ReplaceOneBlock(model, parts, samples, memory, scratch, partial(sum_over_processes, self.processes))
        scorer.start(entries[0].layer)
        for number, entry in enumerate(entries, 1):
            scorer.advance(entry.layer)
            values = scorer.quality_loss(entry.block, self._trained(entry))
            check_finite(f"layer {entry.layer}, candidate {entry.name!r}", values)
            if self.processes.is_global_zero:
                self.blocks.write(entry.file_name, values)
            kl = sum(values["kl"]) / samples
            self.processes.print(f"{number}/{len(entries)}: layer {entry.layer}, {entry.name}: kl {kl:.3g}", flush=True)
        scratch.unlink(missing_ok=True)

    def items(self, task: Evaluation) -> Sequence[Any]:
        """What a task asks."""
        return task_items(task, self.tokenizer)

    def ask_parent(self, model: GptOssPuzzleForCausalLM, task: Evaluation, items: Sequence[Any]) -> None:
        """Lets the parent do a task, unless it has."""
        files = self.evaluation(task.name)
        if not self.processes.broadcast(files.has(PARENT_FILE)):
            self._keep(files, PARENT_FILE, self._answer(model, task, items))

    def evaluate(
        self, model: GptOssPuzzleForCausalLM, task: Evaluation, items: Sequence[Any], entries: Sequence[Entry]
    ) -> None:
        """Lets the parent with each of the entries in it do a task."""
        files = self.evaluation(task.name)
        for number, entry in enumerate(entries, 1):
            with swapped(model, entry.layer, entry.block, self._trained(entry)):
                values = self._answer(model, task, items)
            self._keep(files, entry.file_name, values)
            mean = sum(values) / len(values)
            line = f"{number}/{len(entries)}: layer {entry.layer}, {entry.name}: {task.name} {mean:.3f}"
            self.processes.print(line, flush=True)

    def _answer(self, model: GptOssPuzzleForCausalLM, task: Evaluation, items: Sequence[Any]) -> list[float]:
        unshard = self.settings.unshard_evaluations
        return answer_items(model, self.tokenizer, task, items, self.processes, unshard)

    def _keep(self, files: ScoreFiles, name: str, values: list[float]) -> None:
        if self.processes.is_global_zero:
            files.write(name, {"score": values})

    def _trained(self, entry: Entry) -> dict[str, Tensor]:
        if entry.candidate is None:
            return {}
        return block_tensors(self.library, self.folder, entry.layer, entry.block)


def _check(
    parent: Path,
    library: Library,
    folder: Path,
    data: CalibrationData,
    tasks: Sequence[Evaluation],
    rank_samples: int,
) -> None:
    """All that can be refused before anything slow starts."""
    if data.parent.resolve() != parent.resolve():
        raise ValueError(f"the data is of the parent {data.parent}, the scores of {parent}: name the same folder")
    if rank_samples < 1:
        raise ValueError(f"rank_samples must be 1 or more, got {rank_samples}")
    names = [task.name for task in tasks]
    taken = {*METRICS, MEAN_RANK}
    if len(set(names)) < len(names) or taken & set(names) or not all(name.isidentifier() for name in names):
        raise ValueError(
            f"evaluations are named {names}; names must be identifiers, differ, and be none of {sorted(taken)}"
        )
    library.check_parent(fingerprint(parent))
    if all(len(candidates) == 1 for candidates in library.layers):
        raise ValueError(f"{folder} has no candidate but the parent's own blocks: there is nothing to score")
    for candidates in library.layers:
        for candidate in candidates:
            check_trained(folder, library.config, candidate)


def _summary(scores: Scores) -> dict[str, float]:
    results = {"samples": scores.samples, "tokens": scores.tokens, "rows": len(scores.entries)}
    metrics = {name for entry in scores.entries.values() for name in entry}
    worst = {
        f"{name}/max": max(entry[name].mean for entry in scores.entries.values() if name in entry)
        for name in sorted(metrics)
    }
    return {name: float(value) for name, value in (results | worst).items()}


def print_scores(scores: Scores, metrics: Sequence[str]) -> None:
    """Prints some metrics of every row, one layer a line."""
    names = list(dict.fromkeys(name for _, name in scores.entries))
    layers = sorted({layer for layer, _ in scores.entries})
    for metric in metrics:
        table = Table("layer", *names, title=f"{metric} of replacing one block")
        for layer in layers:
            found = [scores.entries.get((layer, name), {}).get(metric) for name in names]
            table.add_row(str(layer), *("" if m is None else f"{m.mean:.4f} ± {m.standard_error:.4f}" for m in found))
        if any(metric in entry for entry in scores.entries.values()):
            Console().print(table)
