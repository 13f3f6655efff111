"""A child made ready for training: loaded, frozen or adapted, and sharded, in this order only.

Freezing comes before sharding, so that each shard knows what trains; sharding comes before the optimizer, so that its
state exists for local shards only. Reads the child's folder; writes nothing.
Memory: `lit_puzzle.training.sharding`; with adapters on parameters, experts that must be converted are whole on each
process until they are sharded. Of a model without weights, its modules.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM

from lit_puzzle.model.modules import model_family
from lit_puzzle.model.opening import load_config
from lit_puzzle.training.moe_chunks import chunk_experts
from lit_puzzle.training.random_state import RandomStream
from lit_puzzle.training.settings import TrainingSettings
from lit_puzzle.training.sharding import load_for, shard
from lit_puzzle.training.trainable import (
    add_adapters,
    compute_in_autocast_dtype,
    freeze_parameters,
    give_head_contiguous_states,
    train_only,
    without_adapters,
)

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
        ValueError: the reasons of `adapted`.
    """
    loaded, waiting = load_for(mesh, folder, settings.dtype, settings.attention, settings.experts)
    if waiting is not None and settings.lora is not None and settings.lora.target_parameters:
        waiting.fill(loaded)  # PEFT puts adapters where their parameters are: on the meta device they would be lost
    child = adapted(loaded, settings)
    model = without_adapters(child)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.moe_chunk_tokens is not None:
        chunk_experts(model, settings.moe_chunk_tokens)
    compute_in_autocast_dtype(model)
    give_head_contiguous_states(model)
    shard(model, model.model.layers, mesh, waiting, trains=True)
    return child


def reload_child(
    mesh: DeviceMesh | None, folder: Path, settings: TrainingSettings, device: torch.device
) -> "PreTrainedModel | PeftModel":
    """Return a saved child exactly as a run that starts from it has it, to be measured; randomness stays as it was.

    Args:
        mesh: as for `load_child`.
        folder: the folder that a run has written.
        settings: as for `load_child`.
        device: device of this process.
    """
    with RandomStream(device).fork():
        child = load_child(mesh, folder, settings)
    if mesh is None or mesh.size() == 1:
        child = child.to(device)
    return child.eval()


def adapted(model: "PreTrainedModel", settings: TrainingSettings) -> "PreTrainedModel | PeftModel":
    """Freeze what does not train, or add adapters, which then train alone.

    Raises:
        ValueError: `freeze` matches no parameter or leaves nothing to train, or an adapter fits no module.
    """
    if settings.lora is not None:
        return add_adapters(model, settings.lora)
    names = model_family(model).layer
    if settings.trainable is not None:
        train_only(model, names.parts[settings.trainable])
    else:
        freeze_parameters(model, names.frozen if settings.freeze is None else settings.freeze)
    return model


def without_weights(folder: Path, settings: TrainingSettings) -> "PreTrainedModel":
    """Return the model of a checkpoint folder on the meta device: modules, names and shapes.

    Raises:
        ValueError: an implementation of attention or experts that transformers does not have here.
    """
    config = load_config(folder)
    if config.to_dict().get("quantization_config") is not None:
        del config.quantization_config
    how = {"attn_implementation": settings.attention, "experts_implementation": settings.experts}
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **how)
    except (ValueError, ImportError) as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"training: attention {settings.attention}, experts {settings.experts}: {said}") from error
    model.tie_weights()
    return model
