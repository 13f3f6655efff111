"""Expert importance of a parent, in one pass over calibration data under `validate`.

Reads a checkpoint folder (a stock model or a child, whose layers may have different numbers of experts) and batches
`{input_ids, attention_mask}`; writes `importance.json` and `importance.safetensors` into the run folder.
Source: arXiv 2602.11937 section 2; formulas and the other scoring rules in `lit_puzzle.importance.expert_scores`.

The pass is the parent's forward pass in which every MoE layer evaluates the k+1 best experts of a token instead of k;
they give its output (the parent's own, up to rounding) and all leave-one-out errors. Work: (k+1)/k of the MoE part plus
k (k+1) multiply-adds per token, layer and hidden channel.

Memory beside the weights (P b / ranks at rest when sharded) and one layer's inputs and outputs: for chunks of N tokens
4 N D (2 k + 1) + 8 N (4 E + 4 k (k+1)) + 4 n (2 D + 6 I) bytes, n <= N the busiest expert's tokens (8 in place of 4 for
a parent in float64), freed before the next chunk; kept: 16 bytes per expert and layer, which is also all the traffic
between ranks, once. Disk: 8 bytes per expert and layer.

Shapes: B sequences, T tokens, D hidden, N tokens of one chunk, K chosen, M evaluated experts per token, E experts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_puzzle.data.batch_validation import check_rows
from lit_puzzle.data.calibration import CalibrationData
from lit_puzzle.importance.expert_scores import (
    ImportanceMethod,
    LeaveOneOut,
    RoutedTokens,
    entrants,
    evaluate_experts,
    mean_scores,
    mixed_output,
)
from lit_puzzle.importance.importance_file import Importance, scores_identity
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.model.family import Family
from lit_puzzle.model.identity import checkpoint_identity
from lit_puzzle.model.modules import expert_weights, model_family, moe_of, set_moe
from lit_puzzle.run.files import resolved
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.inputs import Identity, record_output
from lit_puzzle.training.sharding import load_for, shard


class ScoredMoE(nn.Module):
    """Replaces the MoE layer of one decoder layer: the same output, and in addition the sums of a scoring rule.

    Args:
        moe: the layer; its parameters are neither moved nor copied.
        family: the model's family.
        layer: index of the decoder layer.
        method: the scoring rule.
        chunk_tokens: tokens evaluated at a time.
    """

    def __init__(self, moe: nn.Module, family: Family, layer: int, method: ImportanceMethod, chunk_tokens: int) -> None:
        super().__init__()
        self.moe = moe
        self._router_name = family.layer.router.removeprefix(f"{family.layer.moe}.")
        self.layer = layer
        self.method = method
        self.chunk_tokens = chunk_tokens
        self.counted_BT: Tensor | None = None  # set before each forward pass: which tokens are scored
        self.reset()

    def reset(self) -> None:
        """Set numerator and denominator of every expert to 0."""
        router = self.router
        self.sums_2E = torch.zeros(2, router.num_experts, dtype=torch.float64, device=router.weight.device)

    @property
    def router(self) -> Any:
        """The layer's router."""
        return self.moe.get_submodule(self._router_name)

    def forward(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return output and gates, as the MoE layer does."""
        assert self.counted_BT is not None
        hidden_SD = hidden_BTD.flatten(0, 1)
        chunks = zip(
            hidden_SD.split(self.chunk_tokens), self.counted_BT.flatten().split(self.chunk_tokens), strict=True
        )
        results = [self._score(hidden_ND, counted_N) for hidden_ND, counted_N in chunks]
        outputs, gates = zip(*results, strict=True)
        return torch.cat(outputs).view_as(hidden_BTD), torch.cat(gates)

    def _score(self, hidden_ND: Tensor, counted_N: Tensor) -> tuple[Tensor, Tensor]:
        logits_NE, gates_NK, experts_NM = self.router(hidden_ND)
        top_k = experts_NM.shape[1]
        if self.method.needs_entrant:
            experts_NM = torch.cat([experts_NM, entrants(logits_NE, experts_NM)], dim=1)
        exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        outputs_NMD = evaluate_experts(hidden_ND, experts_NM, expert_weights(self.moe), exact)
        logits_NM = logits_NE.gather(1, experts_NM).double()
        routed = RoutedTokens(self.layer, logits_NE.shape[1], top_k, experts_NM, logits_NM, outputs_NMD, counted_N)
        self.sums_2E = self.sums_2E + torch.stack(self.method.sums(routed))
        return mixed_output(logits_NM, outputs_NMD, top_k).to(hidden_ND.dtype), gates_NK


def score_layers(model: PreTrainedModel, method: ImportanceMethod, chunk_tokens: int) -> list[ScoredMoE]:
    """Replace the MoE layer of every decoder layer by a `ScoredMoE`, in place.

    Args:
        model: the parent.
        method: the scoring rule.
        chunk_tokens: tokens that a MoE layer evaluates at a time.

    Returns:
        One per layer; their sums grow with every forward pass of the model.
    """
    family, scored = model_family(model), []
    for index, decoder in enumerate(model.model.layers):
        scored.append(ScoredMoE(moe_of(decoder, family), family, index, method, chunk_tokens))
        set_moe(decoder, family, scored[-1])
    return scored


class ExpertImportance(LightningModule):
    """Scores every expert of every layer of a parent (or a child) while validating.

    Args:
        parent: checkpoint folder.
        method: scoring rule: `LeaveOneOut` (the paper's, and the default), `Reap`, `Frequency` or `Random` of
            `lit_puzzle.importance.expert_scores`, or your own class with their interface.
        dtype: dtype of the weights; errors are always computed and summed in float32 or better.
        attn_implementation: "sink_attention" needs memory linear in the sequence; "eager" is the reference.
        chunk_tokens: tokens that a MoE layer evaluates at a time, which bounds its memory.

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
    ) -> None:
        super().__init__()
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}.")
        self.parent = require_input(parent, "parent checkpoint", "config.json")
        self.method = method or LeaveOneOut()
        self.dtype_name = dtype
        self.attn_implementation = attn_implementation
        self.chunk_tokens = chunk_tokens
        self.results: dict[str, float] = {}
        self.model: PreTrainedModel | None = None
        self.scored: list[ScoredMoE] = []

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
        if self.model is not None:
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
        self.tokens = torch.zeros((), dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Run one batch through the model's body (the language-model head is not needed).

        Args:
            batch: `input_ids`, `attention_mask` and optionally `scored_mask` (else the attention mask), each (B, T).
            batch_idx: index of the batch.

        Raises:
            ValueError: token ids or a length that the model does not support, or scores that are not finite.
        """
        assert self.model is not None
        check_rows(batch, self.model.config.vocab_size, self.model.config.max_position_embeddings)
        counted_BT = batch.get("scored_mask", batch["attention_mask"]).bool()
        for layer in self.scored:
            layer.counted_BT = counted_BT
        self.model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        self.tokens += counted_BT.sum()
        self._check_finite(batch_idx)

    def _check_finite(self, batch_idx: int) -> None:
        broken = [layer.layer for layer in self.scored if not bool(layer.sums_2E.isfinite().all())]
        if broken:
            raise ValueError(
                f"Scores of layer {broken[0]} are not finite after batch {batch_idx}. Check the parent for NaN "
                f"weights, or load it with more precision than {self.dtype_name}."
            )

    def on_validation_epoch_end(self) -> None:
        """Sum over all processes, write the importance files and fill `results`.

        Raises:
            ValueError: no token was scored.
        """
        local = torch.cat([self.tokens.view(1), *(layer.sums_2E.flatten() for layer in self.scored)])
        total = self.trainer.strategy.reduce(local, reduce_op="sum").cpu()
        sizes = [layer.sums_2E.numel() for layer in self.scored]
        tokens, sums = int(total[0]), [part.view(2, -1) for part in total[1:].split(sizes)]
        if tokens == 0:
            raise ValueError("No token was scored: the calibration data is empty. Give the data module some sequences.")
        scores = tuple(mean_scores(numerator_E, denominator_E) for numerator_E, denominator_E in sums)
        if self.trainer.is_global_zero:
            importance = Importance(self.fingerprint, self.method.name, tokens, scores)
            folder = Path(self.trainer.default_root_dir)
            importance.save(folder)
            record_output(folder, "importance", scores_identity(folder))
        self.results = summary(scores, tokens)


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
