"""The stage `score`: replace-1-block scores, the quality that each candidate of a library costs alone in the parent.

Reads the parent, its library and calibration data; writes `scores.json` (`lit_puzzle.scoring.scores`, which defines the
metrics) and, during the run, one file per finished candidate (`lit_puzzle.scoring.score_files`). The stage is
resumable: rerun the command, and it continues after the last finished candidate. Candidates with trained tensors are
scored with these.

Scored are the tokens that the parent generated: from the last token of the prompt on, where the data says which that
is.

Scored apart (default), a candidate is its halves, `experts=N` and `window=W`, whose quality losses the search adds; as
pairs, every candidate of the library has its own row. Evaluations (long-context accuracy) are run on the parent first,
so that an error in one of them shows at once, and on window rows at the end, with the candidate in the whole model. One
that decodes answers also measures how much longer they get at each effort (`scoring.evaluate: all`: for experts too).

Candidates that the data cannot judge get no score (`lit_puzzle.scoring.evidence`): windows on sequences no longer than
themselves, expert sets that no token is routed out of. The stage says which before it scores.

Memory: the parent's share (`lit_puzzle.training.fabric`) + one set of hidden states, independent of the number of
layers and candidates (formula in `lit_puzzle.scoring.replace_block`). Time: sum over candidates of (L - l) / L
forward passes of the data, l of L the layer; + 1 generation per evaluation and row. Source: arXiv 2602.11937 section 4,
arXiv 2411.19146.
"""

import random
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from shutil import rmtree

from lightning.fabric import Fabric
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_puzzle.data.calibration import CalibrationData
from lit_puzzle.data.token_rows import RowBatches
from lit_puzzle.library.library import LIBRARY_FILE, Library
from lit_puzzle.library.trained_blocks import block_tensors, check_trained
from lit_puzzle.model.chat import fix_date
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.model.identity import checkpoint_identity
from lit_puzzle.model.opening import load_tokenizer
from lit_puzzle.model.streaming import LayerSource
from lit_puzzle.run.files import read_json
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.identity import file_identity
from lit_puzzle.run.inputs import claim_inputs, record_output, run_date
from lit_puzzle.scoring.block_quality import METRICS
from lit_puzzle.scoring.evaluation_run import EvaluationRun, engine_of
from lit_puzzle.scoring.evaluations import Evaluation, evaluation_items, items_identity
from lit_puzzle.scoring.evidence import changed_window, changes_experts, unjudged, window_share
from lit_puzzle.scoring.layer_errors import LAYER_ERROR
from lit_puzzle.scoring.methods import candidate_values
from lit_puzzle.scoring.replace_block import lay_out
from lit_puzzle.scoring.score_files import COULD_TELL, PARENT_FILE, Entry, ScoreFiles, check_finite, entries_of
from lit_puzzle.scoring.score_table import MEAN_RANK, parent_means, score_table, shares
from lit_puzzle.scoring.scores import SCORES_FILE, Scores
from lit_puzzle.scoring.sequences import open_sequences
from lit_puzzle.scoring.settings import ScoringSettings
from lit_puzzle.scoring.summary import print_scores, summary
from lit_puzzle.training.fabric import FabricSettings, launch, open_parent, sum_over_processes

SCRATCH = "hidden_states"  # folder of each process


def score(
    run_dir: Path,
    parent: Path,
    library: Path,
    data: CalibrationData,
    fabric: FabricSettings = FabricSettings(),  # noqa: B008  (frozen)
    scoring: ScoringSettings = ScoringSettings(),  # noqa: B008
    evaluations: list[Evaluation] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Score every candidate of a library.

    Args:
        run_dir: run folder; gets `scores.json`.
        parent: checkpoint folder.
        library: folder of the parent's library.
        data: the sequences; those that the parent generates are generated once, into the run folder.
        fabric: devices, precision, sharding.
        scoring: what is scored, and how.
        evaluations: tasks whose drop of accuracy is one more metric.
        seed: of the draw of the sequences over which ranks are averaged.

    Returns:
        Samples, tokens, rows, and the largest quality loss in each metric; nothing on processes other than the first.

    Raises:
        ValueError: parent, library and data do not belong together, there are too few sequences, or a quality loss is
            not finite.
    """
    parent = require_input(parent, "parent checkpoint", "config.json")
    library = require_input(library, "block library", LIBRARY_FILE)
    candidates, evaluations = Library.load(library), evaluations or []
    _check(parent, candidates, library, data, evaluations)
    whole = [task.name for task in evaluations if engine_of(task) is None]
    if whole and fabric.memory_gib is not None:
        raise ValueError(
            f"fabric.memory_gib={fabric.memory_gib:g} reads the parent layer by layer, but {whole[0]!r} generates with "
            "the whole parent. Give it an engine, or set evaluations: [], or fabric.memory_gib: null."
        )
    entries = entries_of(candidates, scoring.pairs)
    windows = [entry for entry in entries if entry.name.startswith("window=")]
    evaluated = entries if scoring.evaluate == "all" else windows
    run = _Run(run_dir, parent, library, candidates, fabric, launch(fabric))
    run.claim(data)
    unscored = run.unfinished(run.blocks, entries)
    unevaluated = {task.name: run.unfinished(run.evaluation_files(task), evaluated) for task in evaluations}
    # Evaluations are run on the parent before the blocks: an error in one must not show after days of scoring.
    remaining = [run.evaluation(task) for task in evaluations if unevaluated[task.name]]
    apart = [(task, settings) for task in remaining if (settings := engine_of(task.evaluation)) is not None]
    here = [task for task in remaining if engine_of(task.evaluation) is None]
    batches, prompt_lengths = open_sequences(run.processes, run_dir, data, scoring.score_prompts)
    lengths = [pair for rows in zip(batches, prompt_lengths) for pair in zip(map(len, rows[0]), rows[1])]
    windowed = {
        each: window_share(lengths, changed_window(each)) for each in entries if changed_window(each) is not None
    }
    run.say(unjudged({each: windowed[each] for each in windowed if not changes_experts(each)}, "scored tokens"))
    by_engine = [(task, task.by_engine(settings, parent, run_dir, run.trained)) for task, settings in apart]
    for task, score_folder in by_engine:
        task.measure_parent(score_folder)
    if unscored or here:
        tasks = [(task, unevaluated[task.evaluation.name]) for task in here]
        run.score_in_memory(tasks, (batches, prompt_lengths), unscored, windowed, scoring)
    for task, score_folder in by_engine:  # now that the parent's memory is free
        task.measure(score_folder, unevaluated[task.evaluation.name])
    if not run.processes.is_global_zero:
        return {}
    samples = len(batches.rows)
    ranked = sorted(random.Random(seed).sample(range(samples), min(scoring.rank_samples, samples)))
    finished = {task.name: (run.evaluation_files(task), evaluated) for task in evaluations}
    table = score_table(run.blocks, entries, ranked, finished, PARENT_FILE)
    tokens = sum(int(part.batch["scored_mask"].sum()) for part in lay_out(batches, 0, 1, prompt_lengths))
    told, longest = shares(run.blocks, entries, finished), max(length for length, _ in lengths)
    own = parent_means(finished, PARENT_FILE)
    scores = Scores(candidates.parent_fingerprint, samples, tokens, table, told, longest, own)
    scores.check_library(candidates)
    scores.save(run_dir)
    record_output(run_dir, "scores", file_identity(run_dir / SCORES_FILE))
    print_scores(scores, ["kl", LAYER_ERROR, *finished])
    return summary(scores)


class _Run:
    """The inputs of one scoring run and the steps of it."""

    def __init__(
        self, run_dir: Path, parent: Path, folder: Path, library: Library, settings: FabricSettings, processes: Fabric
    ) -> None:
        self.run_dir, self.parent, self.folder, self.library = run_dir, parent, folder, library
        self.settings, self.processes = settings, processes
        self.blocks = ScoreFiles(run_dir / "candidates")

    def claim(self, data: CalibrationData) -> None:
        """Record the inputs of the run, or check that they are those it was started with.

        Raises:
            ValueError: an input is another one.
        """
        if self.processes.is_global_zero:
            own = {"parent": checkpoint_identity(self.parent), "library": self.library.identity(self.folder)}
            claim_inputs(self.run_dir, own | data.input_identities())

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The parent's; only evaluations need it."""
        tokenizer = load_tokenizer(self.parent)
        fix_date(tokenizer, run_date(self.run_dir))
        return tokenizer

    def evaluation_files(self, evaluation: Evaluation) -> ScoreFiles:
        """Return the files of one evaluation."""
        return ScoreFiles(self.run_dir / "evaluations" / evaluation.name)

    def unfinished(self, files: ScoreFiles, entries: Sequence[Entry]) -> list[Entry]:
        """Return the entries that have no file yet, as the first process sees it."""
        return self.processes.broadcast(files.unfinished(entries))

    def say(self, words: str) -> None:
        """Print a sentence, if there is one, on the first process."""
        if words:
            self.processes.print(words, flush=True)

    def score_in_memory(
        self,
        tasks: Sequence[tuple[EvaluationRun, Sequence[Entry]]],
        data: tuple[RowBatches, Sequence[Sequence[int]]],
        entries: Sequence[Entry],
        windowed: Mapping[Entry, float],
        scoring: ScoringSettings,
    ) -> None:
        """Load the parent; run evaluations on it, score the entries, and run the evaluations on theirs."""
        source = open_parent(self.processes, self.settings, self.parent, head=scoring.depth == "end")
        scores = []
        for task, evaluated in tasks:
            score = task.in_memory(source.model, self.trained, self.settings.unshard_evaluations)
            task.measure_parent(score)
            scores.append((task, score, evaluated))
        self.score_blocks(source, data, entries, windowed, scoring)
        for task, score, evaluated in scores:
            task.measure(score, evaluated)

    def score_blocks(
        self,
        source: LayerSource,
        data: tuple[RowBatches, Sequence[Sequence[int]]],
        entries: Sequence[Entry],
        windowed: Mapping[Entry, float],
        scoring: ScoringSettings,
    ) -> None:
        """Score the entries, which are in the order of the layers; those that the data cannot judge get no score."""
        (batches, prompt_lengths), (rank, world_size) = data, (self.processes.global_rank, self.processes.world_size)
        scratch = self.run_dir / f"{SCRATCH}.{rank}"
        if not entries:
            rmtree(scratch, ignore_errors=True)
            return
        parts, samples = lay_out(batches, rank, world_size, prompt_lengths), len(batches.rows)
        add, told = partial(sum_over_processes, self.processes), dict[Entry, float]()
        scored = candidate_values(source, scratch, parts, samples, entries, scoring, self.trained, add)
        for number, (entry, counted, values_of) in enumerate(scored, 1):
            told[entry] = max(windowed.get(entry, 0.0), counted)
            values = values_of() if told[entry] else {}
            check_finite(f"layer {entry.layer}, candidate {entry.name!r}", values)
            if self.processes.is_global_zero:
                self.blocks.write(entry.file_name, values | {COULD_TELL: [told[entry]]})
            name = "kl" if scoring.depth == "end" else LAYER_ERROR
            found = f"{name} {sum(values[name]) / samples:.3g}" if values else "not measured"
            self.say(f"{number}/{len(entries)}: layer {entry.layer}, {entry.name}: {found}")
        self.say(unjudged({entry: told[entry] for entry in entries if changes_experts(entry)}, "tokens"))
        rmtree(scratch, ignore_errors=True)

    def evaluation(self, evaluation: Evaluation) -> EvaluationRun:
        """Return an evaluation with its items, the same in a resumed run.

        Raises:
            ValueError: the items are not those that the run was started with, or too long for the parent.
        """
        context_tokens = int(read_json(self.parent / "config.json")["max_position_embeddings"])
        items = evaluation_items(evaluation, self.tokenizer, context_tokens)
        if self.processes.is_global_zero:
            claim_inputs(self.run_dir, {f"evaluations.{evaluation.name}": items_identity(evaluation, items)})
        return EvaluationRun(evaluation, items, self.evaluation_files(evaluation), self.tokenizer, self.processes)

    def trained(self, entry: Entry) -> dict[str, Tensor]:
        """Return the trained tensors of an entry, by their names inside its layer."""
        if entry.candidate is None:
            return {}
        return block_tensors(self.library, self.folder, entry.layer, entry.block)


def _check(
    parent: Path, library: Library, folder: Path, data: CalibrationData, evaluations: Sequence[Evaluation]
) -> None:
    """Check everything that can be checked before anything slow starts."""
    if data.parent.resolve() != parent.resolve():
        raise ValueError(f"the data is of the parent {data.parent}, the scores of {parent}: name the same folder")
    names = [evaluation.name for evaluation in evaluations]
    taken = {*METRICS, LAYER_ERROR, MEAN_RANK}
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
