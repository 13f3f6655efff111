"""TRL's configuration of an update, from the settings of a recipe (trl 1.16). Reads and writes nothing."""

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from trl import GRPOConfig

from lit_puzzle.rl.settings import GRPOSettings
from lit_puzzle.training.trainer_validation import PRECISIONS


def trl_precision(precision: str) -> dict[str, bool]:
    """Return TRL's flags for Lightning's `trainer.precision`.

    TRL's flags mean autocast around the model, which Lightning calls mixed. Lightning's `*-true` would turn trained
    weights into half precision, which rounds small steps away; frozen weights have the dtype of the module's settings.

    Raises:
        ValueError: a precision in which a policy cannot be trained.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"trainer.precision={precision} was given; reinforcement learning supports {PRECISIONS}.")
    return {"bf16": precision == "bf16-mixed", "fp16": False}


def config_of(settings: GRPOSettings, trainer: Trainer, reward_weights: Sequence[float]) -> GRPOConfig:
    """Return TRL's configuration of an update of a run; see `grpo_config`."""
    return grpo_config(
        settings,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        precision=str(trainer.precision),
        device=trainer.strategy.root_device,
        output_dir=Path(trainer.default_root_dir),
        reward_weights=reward_weights,
    )


def grpo_config(
    settings: GRPOSettings,
    accumulate_grad_batches: int,
    precision: str,
    device: torch.device,
    output_dir: Path,
    reward_weights: Sequence[float],
) -> GRPOConfig:
    """Return TRL's configuration of an update.

    Call it after the process group exists; TRL would open one of its own.

    Args:
        settings: the update.
        accumulate_grad_batches: slices of an update (`trainer.accumulate_grad_batches`).
        precision: `trainer.precision`.
        device: device of this process.
        output_dir: folder that TRL requires; nothing is written into it.
        reward_weights: weight of each reward function.

    Raises:
        ValueError: a precision that cannot be trained, or another device than TRL's.
    """
    sampling, loss, correction = settings.sampling, settings.loss, settings.rollouts.importance_sampling
    config = GRPOConfig(
        output_dir=str(output_dir),
        seed=sampling.seed,
        use_cpu=device.type == "cpu",
        **trl_precision(precision),
        gradient_checkpointing=False,  # `load_child` enables it on the policy
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        router_aux_loss_coef=0.0,  # None would add the model config's own value to the loss
        per_device_train_batch_size=settings.completions_per_device,
        gradient_accumulation_steps=accumulate_grad_batches,
        steps_per_generation=settings.steps_per_generation,
        num_generations=settings.num_generations,
        num_iterations=settings.num_iterations,
        max_completion_length=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        loss_type=loss.loss_type,
        epsilon=loss.epsilon,
        epsilon_high=loss.epsilon_high,
        importance_sampling_level=loss.importance_sampling_level,
        scale_rewards=loss.scale_rewards,
        beta=loss.beta,
        mask_truncated_completions=loss.mask_truncated_completions,
        multi_objective_aggregation=loss.aggregation,
        reward_weights=list(reward_weights),
        vllm_importance_sampling_correction=True,  # without it TRL computes no log-probabilities to compare
        vllm_importance_sampling_mode="token_truncate" if correction.mode == "none" else correction.mode,
        vllm_importance_sampling_clip_min=correction.clip_min,
        vllm_importance_sampling_clip_max=correction.clip_max,
    )
    if config.device.type == "cuda" and config.n_gpu > 1:
        config._n_gpu = 1  # Lightning chooses the GPUs; without this TRL would use DataParallel on all
    if config.device.type != device.type or (device.type == "cuda" and config.device != device):
        raise ValueError(
            f"TRL uses {config.device}, the strategy {device}. "
            "Choose GPUs with CUDA_VISIBLE_DEVICES, not by number in trainer.devices."
        )
    return config
