"""A child made ready for training: loaded, frozen or adapted, and sharded, in this order only.

Freezing comes before sharding, so that each shard knows what trains; sharding comes before the optimizer, so that its
state exists for local shards only. Reads the child's folder; writes nothing. Memory: `lit_puzzle.training.sharding`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.device_mesh import DeviceMesh

from lit_puzzle.model.modules import model_family
from lit_puzzle.training.settings import TrainingSettings
from lit_puzzle.training.sharding import load_for, shard
from lit_puzzle.training.trainable import add_adapters, freeze_parameters, without_adapters

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def load_child(mesh: DeviceMesh | None, folder: Path, settings: TrainingSettings) -> "PreTrainedModel | PeftModel":
    """Return the child of a folder as it trains, inside a LoRA wrapper if there are adapters.

    Args:
        mesh: the mesh of the running strategy (`LightningModule.device_mesh`); None where nothing is sharded.
        folder: checkpoint folder of the child.
        settings: what trains, dtype and implementations.

    Raises:
        ValueError: `freeze` matches no parameter or leaves nothing to train.
    """
    loaded, waiting = load_for(mesh, folder, settings.dtype, settings.attention, settings.experts)
    child: Any = loaded
    if settings.lora is None:
        freeze_parameters(child, model_family(child).layer.frozen if settings.freeze is None else settings.freeze)
    else:
        child = add_adapters(child, settings.lora)
    model = without_adapters(child)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shard(model, model.model.layers, mesh, waiting, trains=True)
    return child
