"""Validation of the inputs of a step: vocabularies of two models, packed and padded batches, non-finite losses.

Reads the folders' configurations and tokenizers; writes `broken_batch_<rank>.pt` (batch, step and loss) into the run
folder on every process when a loss is not finite. Memory: two vocabularies.
"""

from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_puzzle.data.batches import PackedBatch, PaddedBatch
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.model.opening import load_config, load_tokenizer
from lit_puzzle.spec import Plan


def check_same_tokens(parent: Path, child: Path) -> None:
    """Check that parent and child have the same tokens with the same ids.

    Raises:
        ValueError: vocabularies of two sizes, or a token with two ids.
    """
    sizes = [load_config(folder).vocab_size for folder in (parent, child)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The parent {parent} has {sizes[0]} tokens, the child {child} has {sizes[1]}: their distributions cannot "
            "be compared. Give the parent that the child was made from."
        )
    ours, theirs = (load_tokenizer(folder).get_vocab() for folder in (parent, child))
    for token in sorted(ours.keys() | theirs.keys()):
        if ours.get(token) != theirs.get(token):
            raise ValueError(
                f"The token {token!r} has the id {ours.get(token)} in the parent {parent} and {theirs.get(token)} "
                f"in the child {child}. Give the parent that the child was made from."
            )


def check_pair(parent: Path, child: Path) -> None:
    """Check that a child was made from a parent, if its plan.json says from which, and that they have the same tokens.

    Raises:
        ValueError: another parent, or `check_same_tokens` refuses them.
    """
    check_same_tokens(parent, child)
    plan, found = child / "plan.json", fingerprint(parent)
    if plan.is_file() and (planned := Plan.load(plan).parent_fingerprint) != found:
        raise ValueError(
            f"{plan} is of the parent {planned}, but {parent} is {found}. Give the parent that the child was made "
            "from, or remove plan.json to distill from this model."
        )


def check_packed(batch: PackedBatch, context_tokens: int, vocab_size: int) -> None:
    """Check a packed batch against the parent.

    Raises:
        ValueError: documents longer than the parent's context, or token ids outside its vocabulary.
    """
    ids_BT, positions_BT = batch["input_ids"], batch["position_ids"]
    if ids_BT.shape[1] > context_tokens and int(positions_BT.max()) >= context_tokens:
        raise ValueError(
            f"A sequence of {int(positions_BT.max()) + 1} tokens was given; the parent's context holds "
            f"{context_tokens}. Set the data's sequence_tokens to {context_tokens} or less."
        )
    if int(ids_BT.max()) >= vocab_size:
        raise ValueError(
            f"Token {int(ids_BT.max())} was given; the parent knows 0..{vocab_size - 1}. Tokenize the documents "
            "with the parent's own tokenizer."
        )


def check_rows(batch: PaddedBatch, vocab_size: int, context_tokens: int) -> None:
    """Check a padded batch against the parent.

    Raises:
        ValueError: sequences longer than the context, token ids outside the vocabulary, or masks of another shape.
    """
    ids_BT = batch["input_ids"]
    if ids_BT.shape[1] > context_tokens:
        raise ValueError(
            f"A sequence of {ids_BT.shape[1]} tokens was given; the parent's context holds {context_tokens}. Cut it."
        )
    if ids_BT.numel() and not 0 <= int(ids_BT.min()) <= int(ids_BT.max()) < vocab_size:
        raise ValueError(
            f"Token ids {int(ids_BT.min())}..{int(ids_BT.max())} were given; the parent knows 0..{vocab_size - 1}. "
            "Tokenize the data with the parent's own tokenizer."
        )
    for name in ("attention_mask", "scored_mask"):
        if name in batch and batch[name].shape != ids_BT.shape:
            raise ValueError(
                f"{name} has shape {tuple(batch[name].shape)}, input_ids {tuple(ids_BT.shape)}: they must agree."
            )


def check_finite(trainer: Trainer, loss: Tensor, batch: PackedBatch) -> None:
    """Save the batches and stop all processes if the loss of one is not finite.

    Raises:
        ValueError: a loss that is not finite on any process; the message names the file.
    """
    if trainer.strategy.reduce_boolean_decision(bool(loss.isfinite())):
        return
    file = Path(trainer.default_root_dir) / f"broken_batch_{trainer.global_rank}.pt"
    content = {"batch": {name: tensor.cpu() for name, tensor in batch.items()}, "step": trainer.global_step}
    torch.save(content | {"loss": float(loss)}, file)
    raise ValueError(
        f"The loss is {float(loss)} at step {trainer.global_step} (of one process at least); its batch is in {file}. "
        "Lower the learning rate, clip gradients (trainer.gradient_clip_val), or look for broken weights."
    )
