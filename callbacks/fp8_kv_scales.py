"""FP8 KV scales of the child that reinforcement learning or distillation saves, without a calibration run afterwards.

Reads, after training, the child that the run wrote (the best weights, rounded, adapters merged) and the calibration
sequences; writes `<run>/kv_scales/` (`kv_scales.safetensors`, `kv_scales.json`, a table, a picture), which names that
child by its fingerprint. Sequences that a model generates are written into `<run>/kv_calibration/` before training.
Each validation logs how the initial scales fit the present keys and values:

    kv_start/<layer>/k_amax|k_headroom|k_overflow|k_scale       and v_...: with the scales of the initial weights
    kv/<layer>/...                                              at the end: with the scales that are written

Memory beside training: the statistics (`lit_puzzle.kv_cache.statistics`); at the end the child once more,
P b / processes. Traffic of each pass: gathers P b a batch where weights are sharded.
Source: arXiv 2602.11937 (scales over calibration data); formulas in `lit_puzzle.kv_cache.fp8`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel

from lit_puzzle.data.calibration import CalibrationData, RankBatches
from lit_puzzle.data.documents import PackedDocuments
from lit_puzzle.distill.global_kd import GlobalDistillation
from lit_puzzle.generation.policy import evaluation_mode
from lit_puzzle.kv_cache.calibrate import count_batch
from lit_puzzle.kv_cache.report import per_layer, totals, write_report
from lit_puzzle.kv_cache.scales import ScalePair
from lit_puzzle.kv_cache.settings import ScaleSettings
from lit_puzzle.kv_cache.statistics import KVStatistics, apply_scales, find_scales
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.layout import layer_prefix
from lit_puzzle.model.modules import model_family
from lit_puzzle.rl.module import RLRecovery
from lit_puzzle.run.identity import Identity
from lit_puzzle.training.sharding import load_for, shard


class FP8KVScales(Callback):
    """Writes the KV scales of the child that a run saves.

    Args:
        data: calibration data; None: the validation documents of the run (distillation only).
        scales: how scales are computed.
        watch: whether each validation also runs over the calibration data, to log how the initial scales fit.

    Raises:
        ValueError: another module than RLRecovery or GlobalDistillation, or no documents.
    """

    def __init__(
        self,
        data: CalibrationData | None = None,
        scales: ScaleSettings = ScaleSettings(),  # noqa: B008  (frozen)
        watch: bool = True,
    ) -> None:
        self.data, self.scales, self.watch = data, scales, watch
        self._start: dict[str, Tensor] = {}  # scales of the initial weights, by their names in a checkpoint

    def input_identities(self) -> dict[str, Identity]:
        """Return the identities of the calibration data, if the callback has its own."""
        found = {} if self.data is None else self.data.input_identities()
        return {f"kv_scales.{name}": identity for name, identity in found.items()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check module and data before anything slow.

        Raises:
            ValueError: another module than RLRecovery or GlobalDistillation, or no documents.
        """
        if not isinstance(pl_module, RLRecovery | GlobalDistillation):
            raise ValueError(
                f"FP8KVScales was given {type(pl_module).__name__}; it needs a run that saves a child: RLRecovery or "
                "GlobalDistillation. For an existing checkpoint: lightning run recipes/calibrate_kv.yaml"
            )
        documents = trainer.datamodule  # type: ignore[attr-defined]
        if self.data is None and not (isinstance(documents, PackedDocuments) and documents.validation_one_in):
            raise ValueError(
                f"FP8KVScales has no documents: the run's data, {type(documents).__name__}, has none for validation. "
                "Give it `data`, a lit_puzzle.data.calibration.CalibrationData."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the calibration sequences (generated unless they are there), then compute the initial scales."""
        folder = Path(trainer.default_root_dir) / "kv_calibration"
        if self.data is not None and trainer.is_global_zero:
            folder.mkdir(exist_ok=True)
            self.data.write_sequences(folder, str(trainer.strategy.root_device))
        trainer.strategy.barrier("calibration sequences written")
        if self.watch and not self._start:
            assert isinstance(pl_module, RLRecovery | GlobalDistillation)
            counted = self._count(trainer, pl_module.model)
            windows = [None] * pl_module.model.config.num_hidden_layers  # scales of all layers
            self._start = find_scales(counted, self.scales, windows, "").tensors()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how the initial scales fit the validated weights."""
        if trainer.sanity_checking or not self._start:
            return
        assert isinstance(pl_module, RLRecovery | GlobalDistillation)
        counted = self._count(trainer, pl_module.model)
        names = model_family(pl_module.model).layer.kv_scales
        first: list[ScalePair | None] = []
        for layer in range(pl_module.model.config.num_hidden_layers):
            k_name, v_name = (layer_prefix(layer) + name for name in names)
            first.append((self._start[k_name], self._start[v_name]))
        for logger in trainer.loggers:  # not log_dict, which would warn of each key that it is not reduced
            step = trainer.fit_loop.epoch_loop._batches_that_stepped  # of the validation's own metrics
            logger.log_metrics(per_layer(apply_scales(counted, first), "kv_start"), step=step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Calibrate the child that the module has saved at the end of training."""
        if stage != "fit":
            return
        assert isinstance(pl_module, RLRecovery | GlobalDistillation)
        trainer.strategy.barrier("child written")
        child, folder = pl_module.run_dir / "child", pl_module.run_dir / "kv_scales"
        opened = Checkpoint(child)
        windows = [window for _, window in opened.blocks]
        model = self._load(trainer, pl_module, child)
        scales = find_scales(self._count(trainer, model), self.scales, windows, opened.fingerprint())
        if trainer.is_global_zero:
            scales.save(folder)
            write_report(folder, scales, windows)
        for logger in trainer.loggers:
            logger.log_metrics(per_layer(scales.layers), step=trainer.global_step)
        pl_module.results |= {f"kv/{name}": value for name, value in totals(scales).items()}

    def _load(self, trainer: Trainer, pl_module: RLRecovery | GlobalDistillation, child: Path) -> PreTrainedModel:
        """Return the saved child, sharded as in training."""
        mesh, settings = pl_module.device_mesh, pl_module.training_settings
        model, waiting = load_for(mesh, child, settings.dtype, settings.attention, settings.experts)
        model.requires_grad_(False)
        if waiting is None:
            return model.to(trainer.strategy.root_device)
        shard(model, model.model.layers, mesh, waiting)
        return model

    def _count(self, trainer: Trainer, model: PreTrainedModel) -> KVStatistics:
        """Return the statistics of all processes over the calibration data."""
        device = trainer.strategy.root_device
        statistics = KVStatistics(model, self.scales.per_head, device)
        with torch.inference_mode(False), evaluation_mode(model), trainer.precision_plugin.forward_context():
            for index, batch in enumerate(self._batches(trainer)):
                count_batch(model, {name: tensor.to(device) for name, tensor in batch.items()}, statistics)
                statistics.check_finite(f"batch {index}")
        return statistics.over_processes()

    def _batches(self, trainer: Trainer) -> Iterable[Mapping[str, Tensor]]:
        if self.data is None:
            return trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        batches = self.data.read_batches(Path(trainer.default_root_dir) / "kv_calibration")
        return RankBatches(batches, trainer.global_rank, trainer.world_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the initial scales, which later weights do not determine; the same on all processes."""
        return {"start": dict(self._start)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the initial scales of the resumed run."""
        self._start = dict(state_dict["start"])
