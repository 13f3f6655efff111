"""Calibrate the FP8 KV scales of a checkpoint: one pass over documents with `command: validate`.

Reads a checkpoint folder (a parent or a child) and batches of documents: rows (`lit_puzzle.data.calibration`) or packed
(`lit_puzzle.data.documents`). Writes `kv_scales.safetensors` and `kv_scales.json` into the run folder, with a table and
a picture; during the run also `progress/` (statistics of each process), from which an interrupted run resumes.

Memory: P b / ranks when sharded + one layer's activations + the statistics (`lit_puzzle.kv_cache.statistics`).
Disk: the statistics of each process, until the run is complete. Traffic: P b gathered for each batch when sharded; the
statistics once. P: parameters, b: bytes of each.
Source: arXiv 2602.11937 (scales over calibration data); formulas in `lit_puzzle.kv_cache.fp8`.
"""

from collections.abc import Mapping
from pathlib import Path
from shutil import rmtree
from typing import Literal

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lit_puzzle.data.batch_validation import check_packed, check_rows
from lit_puzzle.data.hidden_states import release
from lit_puzzle.data.packing import model_inputs
from lit_puzzle.kv_cache.report import per_layer, totals, write_report
from lit_puzzle.kv_cache.scales import scales_identity
from lit_puzzle.kv_cache.settings import ScaleSettings
from lit_puzzle.kv_cache.statistics import KVStatistics, find_scales, recording
from lit_puzzle.kv_cache.streamed import FOLDER, count_streamed
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.identity import checkpoint_identity
from lit_puzzle.model.streaming import StreamedModel, load_streamed
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.identity import Identity
from lit_puzzle.run.inputs import record_output
from lit_puzzle.training.sharding import load_for, shard


class KVCalibration(LightningModule):
    """Calibration of the KV scales of a checkpoint, in the validation loop.

    Args:
        checkpoint: folder of the model.
        scales: how scales follow from the data.
        dtype: dtype of the weights.
        attn_implementation: "sink_attention" needs memory linear in the sequence; "eager" is the reference.
        save_every_batches: number of batches between two writes of `progress/`.
        memory_gib: GiB that the pass may take (on a CPU anonymous memory, on a GPU its own): the model is then read one
            layer at a time, and saved after each layer. None: the model is in memory, or sharded over the processes.

    Attributes:
        results: after the pass: tokens, layers, layers left in bf16, saturated values, least headroom, largest amax.

    Raises:
        ValueError: the checkpoint does not exist, or `save_every_batches` is below 1.
    """

    def __init__(
        self,
        checkpoint: Path,
        scales: ScaleSettings = ScaleSettings(),  # noqa: B008  (frozen)
        dtype: Literal["float32", "bfloat16"] = "float32",
        attn_implementation: Literal["sink_attention", "eager"] = "sink_attention",
        save_every_batches: int = 32,
        memory_gib: float | None = None,
    ) -> None:
        super().__init__()
        if save_every_batches < 1:
            raise ValueError(f"save_every_batches={save_every_batches} was given; it must be at least 1.")
        self.checkpoint = require_input(checkpoint, "checkpoint", "config.json")
        self.scales = scales
        self.dtype_name = dtype
        self.attn_implementation = attn_implementation
        self.save_every_batches = save_every_batches
        self.memory_gib = memory_gib
        self.results: dict[str, float] = {}
        self.model: PreTrainedModel | None = None
        self.streamed: StreamedModel | None = None
        self._batches: list[tuple[dict[str, Tensor], Tensor]] = []  # of a streamed model: inputs, and what is counted

    def input_identities(self) -> dict[str, Identity]:
        """Return the identity of the checkpoint."""
        return {"checkpoint": checkpoint_identity(self.checkpoint)}

    def setup(self, stage: str) -> None:
        """Check the checkpoint before anything slow.

        Raises:
            ValueError: the command is not `validate`, or the checkpoint is damaged.
        """
        if stage != "validate":
            raise ValueError(f"Calibration is one pass over data: run it with `command: validate`, not {stage!r}.")
        opened = Checkpoint(self.checkpoint)
        self.fingerprint, self.windows = opened.fingerprint(), [window for _, window in opened.blocks]

    def configure_model(self) -> None:
        """Load the model, sharded if the strategy shards."""
        if self.model is not None or self.streamed is not None:
            return
        if self.memory_gib is not None:
            how = self.dtype_name, self.memory_gib, self.attn_implementation
            self.streamed = load_streamed(self.checkpoint, *how, self.trainer.strategy.root_device)
            return
        mesh = self.device_mesh if isinstance(self.trainer.strategy, ModelParallelStrategy) else None
        model, waiting = load_for(mesh, self.checkpoint, self.dtype_name, self.attn_implementation)
        model.requires_grad_(False)
        shard(model, model.model.layers, mesh, waiting)
        self.model = model

    def on_validation_epoch_start(self) -> None:
        """Start with empty statistics, or with those of an interrupted run of as many processes."""
        self._batches = []
        if self.streamed is not None:
            model_type = self.streamed.checkpoint.config["model_type"]
            self.statistics = KVStatistics(self.streamed.model, self.scales.per_head, self.device, model_type)
            return
        assert self.model is not None
        self.statistics = KVStatistics(self.model, self.scales.per_head, self.device)
        self.batches_done = 0
        state = self._saved_progress()
        done = int(state["batches"]) if state and int(state["processes"]) == self.trainer.world_size else 0
        span = self.trainer.strategy.reduce(torch.tensor([done, -done], device=self.device), reduce_op="max")
        if done > 0 and int(span[0]) == -int(span[1]):  # all processes have saved the same batch
            self.statistics.load_state_dict(state)
            self.batches_done = done

    def _saved_progress(self) -> dict[str, Tensor]:
        """Return what an interrupted run has saved; nothing if the file is damaged: the pass then starts again."""
        if not self._progress.is_file():
            return {}
        try:
            state = load_file(self._progress)
        except (SafetensorError, OSError) as error:
            rank_zero_warn(f"{self._progress} is damaged ({error}); the calibration starts again")
            return {}
        return state if {"batches", "processes", "tokens", "amax", "counts"} == state.keys() else {}

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Count one batch, unless it was counted before the run was interrupted.

        Raises:
            ValueError: token ids outside the vocabulary, a sequence beyond the context length, or keys or values that
                are not finite.
        """
        if self.streamed is not None:  # all batches run through one layer after the other, at the end
            config = self.streamed.model.config
            counted_BT = counted_tokens(batch, config.max_position_embeddings, config.vocab_size)
            names = ("input_ids", "position_ids" if "document_ids" in batch else "attention_mask")
            self._batches.append(({name: batch[name].cpu() for name in names}, counted_BT.cpu()))
            return
        assert self.model is not None
        if batch_idx < self.batches_done:
            return
        count_batch(self.model, batch, self.statistics)
        self.statistics.check_finite(f"batch {batch_idx}")
        self.batches_done = batch_idx + 1
        if self.batches_done % self.save_every_batches == 0:
            self._save_progress()

    @property
    def _progress(self) -> Path:
        return Path(self.trainer.default_root_dir) / "progress" / f"{self.trainer.global_rank}.safetensors"

    def _save_progress(self) -> None:
        numbers = {"batches": self.batches_done, "processes": self.trainer.world_size}
        state = self.statistics.state_dict() | {name: torch.tensor(number) for name, number in numbers.items()}
        self._progress.parent.mkdir(exist_ok=True)
        partial = self._progress.with_suffix(".partial")
        save_file(state, partial)
        partial.replace(self._progress)

    def on_validation_epoch_end(self) -> None:
        """Find the scales over all processes, write and log them, and set `results`."""
        folder = Path(self.trainer.default_root_dir)
        own = folder / f"{FOLDER}.{self.trainer.global_rank}"
        if self.streamed is not None and self._batches:
            batches, counted = zip(*self._batches, strict=True)
            count_streamed(self.streamed, own, batches, counted, self.statistics)
        scales = find_scales(self.statistics.over_processes(), self.scales, self.windows, self.fingerprint)
        if self.trainer.is_global_zero:
            scales.save(folder)
            record_output(folder, "kv_scales", scales_identity(folder))
            write_report(folder, scales, self.windows)
            rmtree(folder / "progress", ignore_errors=True)
        rmtree(own, ignore_errors=True)
        for logger in self.loggers:  # not self.log_dict, which would warn of each key that it is not reduced
            logger.log_metrics(per_layer(scales.layers), step=0)
        self.results = totals(scales)


def count_batch(model: PreTrainedModel, batch: Mapping[str, Tensor], statistics: KVStatistics) -> None:
    """Run one batch of documents through a model and count its keys and values.

    Args:
        model: causal language model without a LoRA wrapper, in evaluation mode; if sharded, the FSDP root.
        batch: rows (`input_ids`, `attention_mask` and optionally `scored_mask`, which says which tokens are counted) or
            packed documents (`input_ids`, `position_ids` and `document_ids`, -1 on padding); each (B, T).
        statistics: statistics that the batch is added to.

    Raises:
        ValueError: token ids outside the vocabulary, or a sequence beyond the context length.
    """
    config = model.config
    counted_BT = counted_tokens(batch, config.max_position_embeddings, config.vocab_size)
    if "document_ids" in batch:
        inputs = model_inputs(model, batch)
    else:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    nothing = torch.empty(0, dtype=torch.long, device=counted_BT.device)
    with torch.no_grad(), recording(model, statistics, counted_BT):
        model(**inputs, logits_to_keep=nothing)
    release(model)


def counted_tokens(batch: Mapping[str, Tensor], context_tokens: int, vocab_size: int) -> Tensor:
    """Check a batch and return which of its tokens are counted, (B, T).

    Raises:
        ValueError: token ids outside the vocabulary, or a sequence beyond the context length.
    """
    if "document_ids" in batch:
        check_packed(batch, context_tokens, vocab_size)
        return batch["document_ids"] >= 0
    check_rows(batch, vocab_size, context_tokens)
    return batch.get("scored_mask", batch["attention_mask"]).bool()
