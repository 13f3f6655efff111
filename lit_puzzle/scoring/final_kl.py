"""The stage `final_kl`: importance of each expert by what the parent's next tokens lose when it alone is removed.

For expert i of layer l, with p the parent's next-token distributions and p_without_i those of the parent with i removed
from l, over the scored tokens x:

    s_i = mean over x of KL(p(x), p_without_i(x))        in nats

Removed means what leave-one-out importance means by it (`lit_puzzle.importance.expert_scores`): the router's logit of i
is -inf, and top-k and softmax are repeated. There the error is taken behind the layer; here the layers above are run,
so that errors that later layers mend or magnify count as they matter. It is a replace-1-block score
(`lit_puzzle.scoring.replace_block`) of the block that has all experts but one.

A sequence of which no token is routed to i stays as it is: it contributes 0 and is not run. Where no token at all is
routed to i, s_i was not measured: NaN, not 0 (`lit_puzzle.importance.importance_file`). A layer's only expert has no
score either: nothing would be left.

Reads the parent and calibration data; writes `importance.json` and `importance.safetensors`, which `library` reads as
any other importance, and, during the run, one small file per finished expert in `candidates/`. Resumable: rerun the
command, and it continues behind the last finished expert, to the same bits.

Time: sum over layers l of E (L - l) / L forward passes, 2 more, less the sequences that are not run. Memory: that of
`lit_puzzle.scoring.replace_block`, independent of layers and experts, and a bool per expert and sequence. A parent that
is read layer by layer (`fabric.memory_gib`) runs all sequences (`lit_puzzle.scoring.streamed_scores`).
Source: this project's own.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from shutil import rmtree

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lit_puzzle.data.calibration import CalibrationData
from lit_puzzle.importance.importance import summary
from lit_puzzle.importance.importance_file import Importance, scores_identity
from lit_puzzle.library.library import parent_blocks
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.identity import checkpoint_identity
from lit_puzzle.model.streaming import LayerSource, StreamedModel
from lit_puzzle.run.files import resolved
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.inputs import claim_inputs, record_output
from lit_puzzle.scoring.evidence import Routed
from lit_puzzle.scoring.methods import candidate_values
from lit_puzzle.scoring.replace_block import Part, ReplaceOneBlock, lay_out
from lit_puzzle.scoring.score_files import COULD_TELL, Entry, Scored, ScoreFiles, Values, check_finite
from lit_puzzle.scoring.sequences import open_sequences
from lit_puzzle.scoring.settings import Memory, ScoringSettings
from lit_puzzle.spec import BlockSpec
from lit_puzzle.training.fabric import FabricSettings, launch, open_parent, sum_over_processes

METHOD = "final_kl"  # in importance.json
SCRATCH = "hidden_states"  # folder of each process


def final_kl(
    run_dir: Path,
    parent: Path,
    data: CalibrationData,
    fabric: FabricSettings = FabricSettings(),  # noqa: B008  (frozen)
    score_prompts: bool = False,
    memory: Memory = Memory(),  # noqa: B008
) -> dict[str, float]:
    """Score every expert by the KL at the end of the parent without it.

    Args:
        run_dir: run folder; gets the importance files.
        parent: checkpoint folder.
        data: the sequences; those that the parent generates are generated once, into the run folder.
        fabric: devices, precision, sharding.
        score_prompts: score the tokens of prompts too, which the parent may never have learned to predict.
        memory: how much memory a process may use beside the model.

    Returns:
        As the importance stage, and the number of experts that were not measured; nothing on processes other than the
        first.

    Raises:
        ValueError: parent and data do not belong together, there are too few sequences, or a score is not finite.
    """
    parent = require_input(parent, "parent checkpoint", "config.json")
    checkpoint = Checkpoint(parent)
    if resolved(data.parent) != resolved(parent):
        raise ValueError(f"the data is of the parent {data.parent}, the scores of {parent}: name the same folder")
    blocks, files, processes = parent_blocks(checkpoint.config), ScoreFiles(run_dir / "candidates"), launch(fabric)
    removals = removals_of(blocks)
    if not removals:
        raise ValueError(f"every layer of {parent} has one expert: there is nothing to choose")
    if processes.is_global_zero:
        claim_inputs(run_dir, {"parent": checkpoint_identity(checkpoint)} | data.input_identities())
    left: list[Entry] = processes.broadcast(files.unfinished(removals))
    batches, prompt_lengths = open_sequences(processes, run_dir, data, score_prompts)
    counts_S = torch.zeros(len(batches.rows), dtype=torch.float64)
    for part in lay_out(batches, 0, 1, prompt_lengths):
        scored_B = part.batch["scored_mask"].sum(dim=1)
        counts_S[part.first_sample : part.first_sample + len(scored_B)] = scored_B.double()
    scratch = run_dir / f"{SCRATCH}.{processes.global_rank}"
    if left:
        source = open_parent(processes, fabric, parent, head=True)
        parts = lay_out(batches, processes.global_rank, processes.world_size, prompt_lengths)
        for entry, share, kl in _scored(source, scratch, parts, counts_S, left, memory, processes):
            check_finite(f"layer {entry.layer}, {entry.name!r}", kl)
            if processes.is_global_zero:
                files.write(entry.file_name, kl | {COULD_TELL: [share]})
    rmtree(scratch, ignore_errors=True)
    if not processes.is_global_zero:
        return {}
    scores = _collected(blocks, files)
    without = tuple(tuple(scores_E.isnan().nonzero()[:, 0].tolist()) for scores_E in scores)
    importance = Importance(
        checkpoint.fingerprint(), METHOD, int(counts_S.sum()), scores, without if any(without) else ()
    )
    importance.save(run_dir)
    record_output(run_dir, "importance", scores_identity(run_dir))
    missing = sum(map(len, without))
    if missing:
        print(f"{missing} experts have no score, no token was routed to them (or they are their layer's only one)")
    measured = tuple(scores_E.nan_to_num(nan=0.0) for scores_E in scores)
    results = summary(measured, importance.tokens)
    results["experts_of_score_0"] -= missing
    return results | {"experts_not_measured": float(missing)}


def removals_of(blocks: Sequence[BlockSpec]) -> list[Entry]:
    """List, layer by layer, the blocks of a parent without one of their experts; none for a layer's only expert."""
    return [
        Entry(layer, _name(expert), "experts", BlockSpec(kept, own.window_tokens), None)
        for layer, own in enumerate(blocks)
        for expert in own.experts
        if (kept := tuple(other for other in own.experts if other != expert))
    ]


def _name(expert: int) -> str:
    return f"experts=all-{expert}"


def _scored(
    source: LayerSource,
    scratch: Path,
    parts: Sequence[Part],
    counts_S: Tensor,
    entries: Sequence[Entry],
    memory: Memory,
    processes: Fabric,
) -> Iterator[tuple[Entry, float, Values]]:
    """Yield each removal, the share of tokens that are routed to the expert, and its KL; no KL where the share is 0."""
    add, samples, layer = partial(sum_over_processes, processes), len(counts_S), -1
    if isinstance(source, StreamedModel):
        settings = ScoringSettings(memory=memory)
        found = candidate_values(source, scratch, parts, samples, entries, settings, lambda _: {}, add)
    else:
        found = _of_routed_sequences(source, scratch, parts, samples, entries, memory, processes)
    for number, (entry, share, values_of) in enumerate(found):
        if entry.layer != layer:
            processes.print(f"{number}/{len(entries)} experts: layer {entry.layer}", flush=True)
            layer = entry.layer
        if share == 0:
            yield entry, 0.0, {}
            continue
        kl_S = torch.tensor(values_of()["kl"], dtype=torch.float64)
        yield entry, share, {"kl": [float((kl_S * counts_S).sum() / counts_S.sum())]}


def _of_routed_sequences(
    source: LayerSource,
    scratch: Path,
    parts: Sequence[Part],
    num_samples: int,
    entries: Sequence[Entry],
    memory: Memory,
    processes: Fabric,
) -> Iterator[Scored]:
    """Yield the removals of a parent in memory, run on the sequences with tokens that are routed to the expert."""
    rmtree(scratch, ignore_errors=True)  # left by an interrupted run
    add = partial(sum_over_processes, processes)
    scorer = ReplaceOneBlock(source.model, parts, num_samples, memory, scratch / "entering", add)
    routed = Routed(source.model, entries)
    scorer.start(entries[0].layer, routed)
    shares = routed.shares(add)
    for entry in entries:
        rows = routed.rows.pop(entry)
        for rows_B in rows if processes.world_size > 1 else ():
            rows_B[0] |= not bool(rows_B.any())  # every process runs every batch: sharded layers are gathered together
        scorer.advance(entry.layer)
        yield entry, shares[entry], partial(scorer.quality_loss, entry.block, rows=rows)


def _collected(blocks: Sequence[BlockSpec], files: ScoreFiles) -> tuple[Tensor, ...]:
    """Return the scores of every layer's experts from their files, NaN where there is none."""
    scores = [torch.full((own.num_experts,), math.nan, dtype=torch.float64) for own in blocks]
    removals = removals_of(blocks)
    for entry, values in zip(removals, files.read([entry.file_name for entry in removals]), strict=True):
        if "kl" in values:
            (removed,) = set(blocks[entry.layer].experts) - set(entry.block.experts)
            scores[entry.layer][removed] = values["kl"][0]
    return tuple(scores)
