"""Small runs of on-policy distillation for tests: a random pair of models, and a whole fit in this process."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback
from transformers import GptOssForCausalLM

from helpers.recovery_runs import Recorder, make_child, make_data, make_trainer
from lit_puzzle.distill.on_policy import OnPolicyDistillation
from lit_puzzle.distill.on_policy_settings import OnPolicySettings
from lit_puzzle.distill.settings import LossSettings
from lit_puzzle.evaluate.before_after import EvaluationSettings
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.tiny.tokenizer import build_tokenizer
from lit_puzzle.training.checkpoints import BestCheckpoint, UpdateCheckpoint
from lit_puzzle.training.lightning import sound_checkpoint
from lit_puzzle.training.sharding import full

ROLLOUTS = OnPolicySettings(completions_per_device=4, sampling=Sampling(6, seed=3))


class Pair(NamedTuple):
    """Folders of a stock parent and of a child with four and two experts."""

    parent: Path
    child: Path


def make_pair(folder: Path, tiny_config: Callable[..., Any]) -> Pair:
    torch.manual_seed(1)
    tokenizer, config = build_tokenizer(), tiny_config(num_hidden_layers=2)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "parent")
    tokenizer.save_pretrained(folder / "parent")
    return Pair(folder / "parent", make_child(folder / "child", tiny_config(num_hidden_layers=2), experts=(4, 2)))


def make_module(pair: Pair, **overrides: Any) -> OnPolicyDistillation:
    settings: dict[str, Any] = {
        "on_policy": ROLLOUTS,
        "loss": LossSettings("kl_mix", chunk_tokens=16),
        "evaluation": EvaluationSettings(prompts_per_effort=4, batch_size=8),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, eps=1e-3),
    }
    return OnPolicyDistillation(pair.child, pair.parent, **(settings | overrides))


def fit(
    folder: Path,
    pair: Pair,
    steps: int,
    processes: int = 1,
    rank: int = 0,
    on_step: Callable[[int], None] | None = None,
    callbacks: Sequence[Callback] = (),
    trainer: dict[str, Any] | None = None,
    **module: Any,
) -> OnPolicyDistillation:
    """One run of one process, resuming from what is in the folder; leaves the trained weights in `weights<rank>.pt`."""
    folder.mkdir(exist_ok=True)
    saved = [UpdateCheckpoint(every_n_updates=2), BestCheckpoint("val/score")]
    settings = {"accumulate_grad_batches": 1, "val_check_interval": 3} | (trainer or {})
    runner = make_trainer(folder, processes, steps, [Recorder(folder, on_step, rank), *callbacks, *saved], **settings)
    made = make_module(pair, **module)
    made.on_train_end = lambda: save_weights(made, folder / f"weights{rank}.pt")  # type: ignore[method-assign]
    runner.fit(made, datamodule=make_data(prompts=24), ckpt_path=sound_checkpoint(folder))
    (folder / f"results{rank}.json").write_text(json.dumps(made.results))
    return made


def save_weights(module: OnPolicyDistillation, file: Path) -> None:
    """Everything that trains, whole, as training left it."""
    torch.save({name: full(p).detach().clone() for name, p in module.named_parameters() if p.requires_grad}, file)


def weights(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    """What `save_weights` kept."""
    return torch.load(folder / f"weights{rank}.pt", weights_only=True)


def results(folder: Path) -> dict[str, float]:
    """Headline numbers of a run."""
    return json.loads((folder / "results0.json").read_text())
