"""Expert importance of a parent, in one pass over calibration data under `validate`.

Reads a checkpoint folder (a stock model or a child, whose layers may have different numbers of experts) and batches
`{input_ids, attention_mask}`; writes `importance.json` and `importance.safetensors` into the run folder.
Source: arXiv 2602.11937 section 2; formulas and the other scoring rules in `lit_puzzle.importance.expert_scores`.

The pass is the parent's forward pass in which every MoE layer evaluates the k+1 best experts of a token instead of k;
they give its output (the parent's own, up to rounding) and all leave-one-out errors. Work: (k+1)/k of the MoE part plus
k (k+1) multiply-adds per token, layer and hidden channel.

With `memory_gib` the parent is read one layer at a time (`lit_puzzle.importance.layer_sums`), to the same bits.
Memory beside the weights (P b / ranks at rest when sharded) and one layer's inputs and outputs: for chunks of N tokens
4 N D (2 k + 1) + 8 N (4 E + 4 k (k+1)) + 4 n (2 D + 6 I) bytes, n <= N the busiest expert's tokens (8 in place of 4 for
a parent in float64), freed before the next chunk; kept: 16 bytes per expert and layer, which is also all the traffic
between ranks, once. Disk: 8 bytes per expert and layer.

Shapes: B sequences, T tokens, D hidden, N tokens of one chunk, K chosen, M evaluated experts per token, E experts.
"""

from collections.abc import Mapping
from pathlib import Path
from shutil import rmtree
from typing import Literal

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from transformers import PreTrainedModel

from lit_puzzle.data.batch_validation import check_rows
from lit_puzzle.data.calibration import CalibrationData
from lit_puzzle.importance.expert_scores import ImportanceMethod, LeaveOneOut, mean_scores
from lit_puzzle.importance.importance_file import Importance, scores_identity
from lit_puzzle.importance.layer_sums import FOLDER, streamed_sums
from lit_puzzle.importance.scored_layers import ScoredMoE, check_finite, score_layers
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.model.identity import checkpoint_identity
from lit_puzzle.model.streaming import StreamedModel, load_streamed
from lit_puzzle.run.files import resolved
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.identity import Identity
from lit_puzzle.run.inputs import record_output
from lit_puzzle.training.sharding import load_for, shard

NO_TOKEN = "No token was scored: the calibration data is empty. Give the data module some sequences."


class ExpertImportance(LightningModule):
    """Scores every expert of every layer of a parent (or a child) while validating.

    Args:
        parent: checkpoint folder.
        method: scoring rule: `LeaveOneOut` (the paper's; also where none is given), `Reap`, `Frequency` or `Random` of
            `lit_puzzle.importance.expert_scores`, or your own class with their interface.
        dtype: dtype of the weights; errors are always computed and summed in float32 or better.
        attn_implementation: "sink_attention" needs memory linear in the sequence; "eager" is the reference.
        chunk_tokens: tokens that a MoE layer evaluates at a time, which bounds its memory.
        memory_gib: GiB that the pass may take (on a CPU anonymous memory, on a GPU its own): the parent is then read
            one layer at a time. None: the parent is in memory, or sharded over the processes.

    Attributes:
        results: after the pass: tokens, layers, experts, experts of score 0, and the smallest and largest share of a
            layer's summed score that the better half of its experts has.

    Raises:
        ValueError: the parent is missing, or `chunk_tokens` is below 1.
    """

    def __init__(
        self,
        parent: Path,
        method: ImportanceMethod | None = None,
        dtype: Literal["float32", "bfloat16", "float64"] = "float32",
        attn_implementation: Literal["sink_attention", "eager"] = "sink_attention",
        chunk_tokens: int = 4096,
        memory_gib: float | None = None,
    ) -> None:
        super().__init__()
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}.")
        self.parent = require_input(parent, "parent checkpoint", "config.json")
        self.method = method or LeaveOneOut()
        self.dtype_name = dtype
        self.attn_implementation = attn_implementation
        self.chunk_tokens = chunk_tokens
        self.memory_gib = memory_gib
        self.results: dict[str, float] = {}
        self.model: PreTrainedModel | None = None
        self.streamed: StreamedModel | None = None
        self.scored: list[ScoredMoE] = []
        self._batches: list[Mapping[str, Tensor]] = []  # of a streamed parent

    def input_identities(self) -> dict[str, Identity]:
        """Return the identity of the parent."""
        return {"parent": checkpoint_identity(self.parent)}

    def setup(self, stage: str) -> None:
        """Check the parent's folder before anything slow starts.

        Raises:
            ValueError: the stage is not `validate`, or the folder is no valid checkpoint.
        """
        if stage != "validate":
            raise ValueError(f"Importance is one pass over data: run it with `command: validate`, not {stage!r}.")
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, CalibrationData) and resolved(data.parent) != resolved(self.parent):
            raise ValueError(
                f"the data is of the parent {data.parent}, the importance of {self.parent}: name the same folder"
            )
        self.fingerprint = fingerprint(self.parent)

    def configure_model(self) -> None:
        """Load the parent, replace its MoE layers by scored ones, and shard it where the strategy shards."""
        if self.model is not None or self.streamed is not None:
            return
        if self.memory_gib is not None:
            device = self.trainer.strategy.root_device
            how = self.dtype_name, self.memory_gib, self.attn_implementation
            self.streamed = load_streamed(self.parent, *how, device)
            return
        mesh = self.device_mesh if isinstance(self.trainer.strategy, ModelParallelStrategy) else None
        model, waiting = load_for(mesh, self.parent, self.dtype_name, self.attn_implementation)
        model.requires_grad_(False)
        self.scored = score_layers(model, self.method, self.chunk_tokens)
        shard(model.model, model.model.layers, mesh, waiting)
        self.model = model

    def on_validation_epoch_start(self) -> None:
        """Reset all sums."""
        for layer in self.scored:
            layer.reset()
        self._batches = []
        self.tokens = torch.zeros((), dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Run one batch through the model's body (the language-model head is not needed).

        Args:
            batch: `input_ids`, `attention_mask` and optionally `scored_mask` (else the attention mask), each (B, T).
            batch_idx: index of the batch.

        Raises:
            ValueError: token ids or a length that the model does not support, or scores that are not finite.
        """
        model = self.model if self.streamed is None else self.streamed.model
        assert model is not None
        check_rows(batch, model.config.vocab_size, model.config.max_position_embeddings)
        counted_BT = batch.get("scored_mask", batch["attention_mask"]).bool()
        self.tokens += counted_BT.sum()
        if self.streamed is not None:  # all batches run through one layer after the other, at the end
            kept = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "counted": counted_BT}
            self._batches.append({name: tensor.cpu() for name, tensor in kept.items()})
            return
        for layer in self.scored:
            layer.counted_BT = counted_BT
        model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        check_finite(self.scored, f"batch {batch_idx}")

    def on_validation_epoch_end(self) -> None:
        """Sum over all processes, write the importance files and fill `results`.

        Raises:
            ValueError: no token was scored.
        """
        own = self._sums()
        local = torch.cat([self.tokens.view(1), *(sums_2E.flatten() for sums_2E in own)])
        total = self.trainer.strategy.reduce(local, reduce_op="sum").cpu()
        sizes = [sums_2E.numel() for sums_2E in own]
        tokens, sums = int(total[0]), [part.view(2, -1) for part in total[1:].split(sizes)]
        if tokens == 0:
            raise ValueError(NO_TOKEN)
        scores = tuple(mean_scores(numerator_E, denominator_E) for numerator_E, denominator_E in sums)
        if self.trainer.is_global_zero:
            importance = Importance(self.fingerprint, self.method.name, tokens, scores)
            folder = Path(self.trainer.default_root_dir)
            importance.save(folder)
            record_output(folder, "importance", scores_identity(folder))
        rmtree(self._layers_folder, ignore_errors=True)
        self.results = summary(scores, tokens)

    @property
    def _layers_folder(self) -> Path:
        return Path(self.trainer.default_root_dir) / f"{FOLDER}.{self.trainer.global_rank}"

    def _sums(self) -> list[Tensor]:
        """Return this process's sums of every layer, on its device."""
        if self.streamed is None:
            return [layer.sums_2E for layer in self.scored]
        if not self._batches:
            raise ValueError(NO_TOKEN)
        batches, counted = self._batches, [batch["counted"] for batch in self._batches]
        sums = streamed_sums(self.streamed, self._layers_folder, batches, counted, self.method, self.chunk_tokens)
        return [sums_2E.to(self.device) for sums_2E in sums]


def summary(scores: tuple[Tensor, ...], tokens: int) -> dict[str, float]:
    """Return the headline numbers: how much was scored, and how unevenly importance is spread within a layer."""
    shares = []
    for scores_E in scores:
        better_half = scores_E.sort(descending=True).values[: (len(scores_E) + 1) // 2]
        shares.append(float(better_half.sum() / scores_E.sum()) if scores_E.sum() > 0 else 0.0)
    return {
        "tokens": float(tokens),
        "layers": float(len(scores)),
        "experts": float(sum(len(scores_E) for scores_E in scores)),
        "experts_of_score_0": float(sum(int((scores_E == 0).sum()) for scores_E in scores)),
        "better_half_share/min": min(shares),
        "better_half_share/max": max(shares),
    }
