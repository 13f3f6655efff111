"""Distance of a model from its parent on documents that neither was trained on: KL, perplexity, agreement.

Over the target tokens t of all documents, with p the parent's and q the model's distribution after the tokens before t:

    kl                mean of KL(p || q)
    perplexity        exp(mean of -log q(t)); perplexity/parent: with p; perplexity/ratio: their quotient
    same_token        share of targets at which both find the same token most likely

With `position_bins` also the losses by position in the document (`lit_puzzle.evaluate.position_loss`).

Standard errors count documents, not tokens: with n_d targets and the sum x_d in document d of D, the mean
r = sum x / sum n has the error sqrt(D / (D - 1) sum (x_d - r n_d)^2) / sum n. The error of the ratio is the ratio times
that of the mean difference of logarithms.

The documents are those that `PackedDocuments` with the same `validation_one_in` holds out of training. Reads documents
and both checkpoints; writes `text_distance.jsonl`, a line for each document. Memory: both models, the states of one
batch, and 20 bytes x 512 targets x vocabulary. Time: one forward pass of both models.
Source: arXiv 2411.19146 (KL to the parent's distribution).

Shapes: B documents of T tokens, N targets, D channels, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from lit_puzzle.data.document_files import DocumentFolder
from lit_puzzle.data.held_out_documents import held_out_documents
from lit_puzzle.evaluate.position_loss import bin_names, binned_sums, mean_over_documents, print_bins, summarize_bins
from lit_puzzle.evaluate.text_footprint import CHUNK_TOKENS
from lit_puzzle.model.identity import checkpoint_identity
from lit_puzzle.model.loading import load_model
from lit_puzzle.run.files import to_json, write_atomically
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.identity import file_identity
from lit_puzzle.run.inputs import claim_inputs, record_output

ROWS_FILE = "text_distance.jsonl"
SUMS = ("kl", "log_loss", "parent_log_loss", "same_token")
Row = dict[str, float]


def text_distance(
    run_dir: Path,
    checkpoint: Path,
    parent: Path,
    documents: Path,
    validation_one_in: int = 16,
    batch_size: int = 8,
    dtype: Literal["float32", "bfloat16"] = "float32",
    position_bins: list[int] | None = None,
) -> dict[str, float]:
    """Compare a model with its parent on documents held out of training.

    Args:
        run_dir: the run's folder; gets `text_distance.jsonl`.
        checkpoint: folder of the model.
        parent: folder of the parent.
        documents: folder of documents.
        validation_one_in: that of the training data; 1: all documents.
        batch_size: documents computed together.
        dtype: of the weights; results are summed in float64.
        position_bins: edges of bins of positions, in tokens; None: no losses by position.

    Returns:
        `documents`, `targets`, and `kl`, `perplexity`, `perplexity/parent`, `perplexity/ratio`, `same_token`, each but
        the parent's with `_se`; with `position_bins` those of `summarize_bins`.

    Raises:
        ValueError: folders that are missing or of another tokenizer, fewer than two documents, or numbers below 1.
    """
    if min(validation_one_in, batch_size) < 1:
        raise ValueError(
            f"validation_one_in {validation_one_in}, batch_size {batch_size} were given; each must be 1 or more."
        )
    edges = position_bins or []
    if position_bins is not None:
        bin_names(edges)
    checkpoint, parent = (
        require_input(folder, what, "config.json") for folder, what in ((checkpoint, "checkpoint"), (parent, "parent"))
    )
    folder = DocumentFolder(documents)
    rows = held_out_documents(folder, validation_one_in)
    for reader in (checkpoint, parent):
        folder.check_reader(reader, max(len(ids) for ids, _ in rows))
    claim_inputs(
        run_dir,
        {
            "checkpoint": checkpoint_identity(checkpoint),
            "parent": checkpoint_identity(parent),
            "documents": folder.input_identity(),
        },
    )
    device = "cuda" if torch.cuda.is_available() else None
    models = [load_model(path, dtype, "sink_attention", device=device) for path in (checkpoint, parent)]
    order = sorted(range(len(rows)), key=lambda place: len(rows[place][0]))
    measured: dict[int, Row] = {}
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        measured |= zip(places, _distances(models, [rows[place] for place in places], edges), strict=True)
    ordered = [measured[place] for place in range(len(rows))]
    write_atomically(run_dir / ROWS_FILE, "".join(to_json(row, indent=None) + "\n" for row in ordered))
    record_output(run_dir, "text_distance", file_identity(run_dir, [ROWS_FILE]))
    results = summarize(ordered)
    _print_table(results)
    if edges:
        results |= summarize_bins(ordered, edges)
        print_bins(results, ordered, edges)
    return results


@torch.inference_mode()
def _distances(
    models: Sequence[PreTrainedModel],
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    edges: Sequence[int],
) -> list[Row]:
    """Return the sums of each document over its targets, and over those of each bin of positions."""
    longest = max(len(ids) for ids, _ in rows)
    padded = [[list(part) + [0] * (longest - len(part)) for part in row] for row in rows]
    ids_BT, mask_BT = (torch.tensor(part, device=models[0].device) for part in zip(*padded, strict=True))
    before_BT = torch.zeros_like(mask_BT, dtype=torch.bool)
    before_BT[:, :-1] = mask_BT[:, 1:] > 0
    tokens_N = ids_BT[:, 1:][before_BT[:, :-1]]
    # Padding stands behind every token that counts, where causal attention does not see it.
    states = [model.model(input_ids=ids_BT, use_cache=False).last_hidden_state[before_BT] for model in models]
    parts = []
    for start in range(0, len(tokens_N), CHUNK_TOKENS):
        here = slice(start, start + CHUNK_TOKENS)
        log_q_NV, log_p_NV = (
            model.lm_head(state[here]).float().log_softmax(-1) for model, state in zip(models, states, strict=True)
        )
        parts.append(_per_target(log_q_NV, log_p_NV, tokens_N[here]))
    values_SN = torch.cat(parts, dim=1)
    found = []
    for before_T, values in zip(before_BT.cpu(), values_SN.split(before_BT.sum(1).tolist(), dim=1), strict=True):
        row = {"targets": float(values.shape[1])} | dict(zip(SUMS, values.sum(1).tolist(), strict=True))
        if edges:
            row |= binned_sums(dict(zip(SUMS, values, strict=True)), before_T.nonzero()[:, 0] + 1, edges)
        found.append(row)
    return found


def _per_target(log_q_NV: Tensor, log_p_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """Return the rows of `SUMS` for each target."""
    kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
    losses = [-log_NV.gather(1, tokens_N[:, None])[:, 0] for log_NV in (log_q_NV, log_p_NV)]
    same_N = log_q_NV.argmax(-1) == log_p_NV.argmax(-1)
    return torch.stack([kl_N, *losses, same_N]).double().cpu()


def summarize(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return means over targets and their standard errors over documents.

    Args:
        rows: sums of each document.

    Raises:
        ValueError: fewer than two documents.
    """
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} held-out documents: a standard error needs two. Lower validation_one_in.")
    targets = [row["targets"] for row in rows]
    kl, kl_se = mean_over_documents([row["kl"] for row in rows], targets)
    loss, loss_se = mean_over_documents([row["log_loss"] for row in rows], targets)
    parent_loss, _ = mean_over_documents([row["parent_log_loss"] for row in rows], targets)
    more, more_se = mean_over_documents([row["log_loss"] - row["parent_log_loss"] for row in rows], targets)
    same, same_se = mean_over_documents([row["same_token"] for row in rows], targets)
    return {
        "documents": float(len(rows)),
        "targets": math.fsum(targets),
        "kl": kl,
        "kl_se": kl_se,
        "perplexity": math.exp(loss),
        "perplexity_se": math.exp(loss) * loss_se,
        "perplexity/parent": math.exp(parent_loss),
        "perplexity/ratio": math.exp(more),
        "perplexity/ratio_se": math.exp(more) * more_se,
        "same_token": same,
        "same_token_se": same_se,
    }


def _print_table(results: Mapping[str, float]) -> None:
    table = Table("", "mean", "standard error", title=f"On {results['documents']:.0f} held-out documents")
    for name in ("kl", "perplexity", "perplexity/ratio", "same_token"):
        table.add_row(name, f"{results[name]:.4f}", f"{results[f'{name}_se']:.4f}")
    Console().print(table)
