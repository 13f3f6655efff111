"""A parent's most likely tokens, computed once and kept on disk: for those who cannot hold parent and child together.

For every target position t of every document, with p the parent's distribution after the tokens before t:

    token_ids   the K most likely tokens, most likely first
    log_probs   log p of each of them
    log_rest    log (1 - sum of their p), summed over the other tokens (-inf where K is the vocabulary)

`log_rest` is kept because the most likely tokens alone are a biased picture of p: arXiv 2503.16870.
As float16 a logarithm x is off by |x| 2^-11 at most, so that p is off by p |x| 2^-11 <= 0.37 * 2^-11 < 2e-4.

Reads the parent and a folder of documents; writes `top_logits/` into the run folder, a file for each shard of documents
(`lit_puzzle.distill.top_logits_files`, which also reads them for a packed batch). A run that is killed goes on with the
first missing file. A document is computed as if alone, many of them packed together.

A parent that no device can hold is sharded over several processes (`lit_puzzle.training.fabric`); each
computes other sequences and the first one writes.

Memory: the parent's share, the activations of `batch_tokens` tokens, 12 V C bytes, one shard of documents (5 bytes a
token); on the first process also what the others found in one round. Disk: for every target K (4 + b) + b bytes with
b = 2 (float16) or 4, + 8 bytes a document + 520 a shard. Traffic: of a round of sequences, one a process, the parent's
bytes (if sharded) and 16 K bytes a target.

Shapes: D documents and N targets of a shard, S tokens and M targets of one packed sequence, E channels, C targets of a
chunk, K tokens kept, V vocabulary.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, distributed
from transformers import PreTrainedModel

from lit_puzzle.data.document_files import DocumentFolder, Shard
from lit_puzzle.data.packing import Integers, model_inputs, pack, restarting_positions
from lit_puzzle.distill.losses import TopParent
from lit_puzzle.distill.top_logits_files import (
    Precision,
    check_disk,
    disk_bytes,
    file_name,
    new_shard,
    rest_mass,
    write_record,
)
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.run.folder import require_input
from lit_puzzle.training.fabric import FabricSettings, launch, load_parent

FOLDER = "top_logits"
Found = tuple[Integers, dict[str, NDArray[Any]]]  # rows of a shard's arrays, and their contents by name


def precompute_logits(
    run_dir: Path,
    parent: Path,
    documents: Path,
    top_k: int = 64,
    precision: Precision = "float16",
    batch_tokens: int = 8192,
    chunk_tokens: int = 256,
    fabric: FabricSettings = FabricSettings(),  # noqa: B008  (frozen)
) -> dict[str, float]:
    """Writes the parent's most likely tokens at every target of a folder of documents.

    Args:
        run_dir: The run's folder; gets `top_logits/`.
        parent: Checkpoint folder.
        documents: Folder of documents, tokenized for this parent (written by whomever).
        top_k: Tokens kept.
        precision: Of the logarithms on disk.
        batch_tokens: Tokens computed together; a longer document is computed by itself.
        chunk_tokens: Targets whose logits are there at a time.
        fabric: Devices, precision, sharding.

    Returns:
        `documents`, `targets`, `disk_bytes`, and `kept_mass`: the mean probability of the tokens kept; nothing on
        processes other than the first.

    Raises:
        ValueError: Documents of another tokenizer or longer than the parent's context, `top_k` outside the
            vocabulary, no target at all, or too little disk.
    """
    parent, folder = require_input(parent, "parent checkpoint"), DocumentFolder(documents)
    shards = folder.record["shards"]
    folder.check_reader(parent, max((row["longest"] for row in shards), default=0))
    if not 1 <= top_k <= folder.writer.vocab_size or min(batch_tokens, chunk_tokens) < 1:
        raise ValueError(
            f"top_k {top_k}, batch_tokens {batch_tokens}, chunk_tokens {chunk_tokens} were given; needed are "
            f"1..{folder.writer.vocab_size} (the vocabulary), and at least 1."
        )
    targets = int(folder.record["targets"])
    if targets == 0:
        raise ValueError(f"{folder.folder} holds no target. `lightning run recipes/generate.yaml` makes documents.")
    needed = disk_bytes(targets, len(folder), len(shards), top_k, precision)
    check_disk(run_dir, needed)
    target, processes = run_dir / FOLDER, launch(fabric)
    missing = [number for number in range(len(shards)) if not (target / file_name(number)).is_file()]
    missing = processes.broadcast(missing)  # as the first process sees it
    if missing:  # else an attempt that was killed had made them all
        model = load_parent(processes, fabric, parent)
        target.mkdir(exist_ok=True)  # not before: what is refused leaves nothing behind
        for number in missing:
            shard = folder.shard(number)
            settings = top_k, batch_tokens, chunk_tokens, processes
            if processes.is_global_zero:
                with new_shard(target / file_name(number), first_targets(shard), top_k, precision) as arrays:
                    fill(arrays, model, shard, *settings)
            else:
                fill({}, model, shard, *settings)
    if not processes.is_global_zero:
        return {}
    write_record(target, fingerprint(parent), folder, top_k, precision)
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    return {
        "documents": float(len(folder)),
        "targets": float(targets),
        "disk_bytes": float(size),
        "kept_mass": 1 - rest_mass(target, len(shards)) / targets,
    }


def first_targets(shard: Shard) -> Integers:
    """The row of each document's first target, and at the end the number of rows (D + 1)."""
    before_N1 = np.concatenate([[0], np.cumsum(shard.mask_N, dtype=np.int64)])
    return before_N1[shard.offsets]


def fill(
    arrays: dict[str, NDArray[Any]],
    model: PreTrainedModel,
    shard: Shard,
    top_k: int,
    batch_tokens: int,
    chunk_tokens: int,
    processes: Fabric,
) -> None:
    """Computes one shard, a sequence a process at a time, into the arrays of the first process.

    Where sequences are left for some processes only, the others compute one of theirs too, and it is dropped: layers
    of a sharded parent are gathered by all processes together.
    """
    world, sequences = processes.world_size, list(packed_tokens(shard, batch_tokens))
    for begin in range(0, len(sequences), world):
        together = sequences[begin : begin + world]
        mine = together[processes.global_rank % len(together)]
        found = find(model, shard, *mine, top_k, chunk_tokens)
        for rows_M, contents in _to_the_first(found, processes)[: len(together)]:
            for name, values in contents.items():
                arrays[name][rows_M] = values


def _to_the_first(found: Found, processes: Fabric) -> list[Found]:
    """What every process found, in their order, on the first process; nothing on the others."""
    if processes.world_size == 1:
        return [found]
    gathered: list[Any] | None = [None] * processes.world_size if processes.is_global_zero else None
    distributed.gather_object(found, gathered)
    return gathered or []


def find(
    model: PreTrainedModel, shard: Shard, tokens_S: Integers, document_ids_S: Integers, top_k: int, chunk_tokens: int
) -> Found:
    """The most likely tokens at the targets of one packed sequence of a shard."""
    is_target_S = shard.mask_N[tokens_S] == 1
    rows_M = (np.cumsum(shard.mask_N, dtype=np.int64) - 1)[tokens_S][is_target_S]
    ids_S = torch.from_numpy(shard.ids_N[tokens_S]).long()
    batch = {"input_ids": ids_S[None], "position_ids": restarting_positions(torch.from_numpy(document_ids_S)[None])}
    device = model.lm_head.weight.device
    batch = {name: values.to(device) for name, values in batch.items()}
    with torch.no_grad():  # sharded weights cannot be gathered in inference mode
        hidden_SE = model.model(**model_inputs(model, batch)).last_hidden_state[0]
        before_M = torch.from_numpy(np.flatnonzero(is_target_S) - 1).to(device)
        found = [top_of(model.lm_head(hidden_CE), top_k) for hidden_CE in hidden_SE[before_M].split(chunk_tokens)]
    names = ("token_ids", "log_probs", "log_rest")
    return rows_M, {
        name: torch.cat(parts).cpu().numpy() for name, parts in zip(names, zip(*found, strict=True), strict=True)
    }


def packed_tokens(shard: Shard, batch_tokens: int) -> Iterator[tuple[Integers, Integers]]:
    """For each packed sequence the places of its tokens in the shard and their documents (S); all that have targets."""
    lengths_D = np.diff(shard.offsets)
    used_D = np.flatnonzero(np.diff(first_targets(shard)))
    if len(used_D) == 0:
        return
    sequences_D, _ = pack(lengths_D[used_D], max(batch_tokens, int(lengths_D.max())), "first_fit")
    for sequence in range(int(sequences_D.max()) + 1):
        documents = used_D[sequences_D == sequence]
        spans = [np.arange(shard.offsets[d], shard.offsets[d + 1]) for d in documents]
        yield np.concatenate(spans), np.repeat(documents, lengths_D[documents])


def top_of(logits_CV: Tensor, top_k: int) -> TopParent:
    """The most likely tokens of some positions; in float32 at least. Works in the logits' own memory."""
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    log_total_C1 = logits_CV.logsumexp(dim=-1, keepdim=True)
    top_CK, ids_CK = logits_CV.topk(top_k, dim=-1)
    log_rest_C = logits_CV.scatter_(1, ids_CK, float("-inf")).logsumexp(dim=-1)
    return TopParent(ids_CK, top_CK - log_total_C1, log_rest_C - log_total_C1[:, 0])
