"""The best validated weights of a run, loaded back into its model.

Reads what `BestCheckpoint` wrote into the run folder; writes nothing. Memory: the trainable weights.
"""

from pathlib import Path

from lightning.pytorch import LightningModule

from lit_puzzle.training.checkpoints import BestCheckpoint
from lit_puzzle.training.sharding import load_trainable


def load_best(module: LightningModule) -> None:
    """Load the best validated weights; without `BestCheckpoint` or a validation the last weights stay.

    Args:
        module: the module, at the end of its fit.

    Raises:
        ValueError: the best weights are no longer on disk.
    """
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, BestCheckpoint) or not callback.best_model_path:
            continue
        best = Path(callback.best_model_path)
        if not best.exists():
            raise ValueError(
                f"The best weights {best} ({callback.monitor} = {callback.best_score}) are missing; they must stay "
                "until the run is complete. Start again with --overwrite."
            )
        load_trainable(module, best)
