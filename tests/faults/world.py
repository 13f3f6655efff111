"""A small world for faults: every stage of the chain on the embedded tiny models, in settings that take about a second.

`Stage` says how a stage is run there, what it reads and which of its files are results. `World` runs each stage once,
when its results are first needed; a trial gets copies of what its stage reads.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from faults.commands import Run, Server

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "lit_puzzle" / "assets"
OUT = "out"  # the run folder of a trial
CALIBRATION = (
    "--data.init_args.prompts.num_prompts=6",
    "--data.init_args.sampling.max_new_tokens=16",
)
TRAINER = (
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.callbacks=[{class_path: lit_puzzle.training.checkpoints.UpdateCheckpoint, init_args: "
    "{every_n_updates: 1}}%s]",
)


def trainer(*callbacks: str) -> tuple[str, ...]:
    """The words that make a training small: two updates, a checkpoint and a validation after each."""
    return (*TRAINER[:-1], TRAINER[-1] % "".join(f", {each}" for each in callbacks))


@dataclass(frozen=True)
class Stage:
    """One stage in the small world.

    Args:
        recipe: packaged recipe.
        words: overrides that make it small and name its inputs.
        inputs: folders of the world that it reads.
        results: patterns of its result files, equal byte for byte in every run of the same command.
    """

    recipe: str
    words: tuple[str, ...]
    inputs: tuple[str, ...]
    results: tuple[str, ...]

    def command(self, *more: str, run_dir: str = OUT) -> list[str]:
        """The command line, with further overrides."""
        return ["run", f"recipes/{self.recipe}.yaml", f"--run_dir={run_dir}", *self.words, *more]


BEST = "{class_path: lit_puzzle.training.checkpoints.BestCheckpoint, init_args: {monitor: val/loss, mode: min}}"
STAGES = {
    "generate": Stage(
        "generate",
        (
            "--parent=parent",
            "--prompts.num_prompts=24",
            "--sampling.max_new_tokens=32",
            "--engine.batch_size=12",
            "--shard_size=12",
        ),
        ("parent",),
        ("documents/*",),
    ),
    "importance": Stage(
        "importance",
        (
            "--model.init_args.parent=parent",
            "--data.init_args.parent=parent",
            "--trainer.accelerator=cpu",
            *CALIBRATION,
        ),
        ("parent",),
        ("importance.*", "calibration.jsonl"),
    ),
    "library": Stage(
        "library",
        ("--parent=parent", "--importance=runs/importance", "--experts=[8]", "--windows=[16]"),
        ("parent", "runs/importance"),
        ("library.json",),
    ),
    "score": Stage(
        "score",
        (
            "--parent=parent",
            "--library=runs/library",
            "--fabric.accelerator=cpu",
            "--scoring.rank_samples=8",
            "--evaluations=null",
            *CALIBRATION,
        ),
        ("parent", "runs/library"),
        ("scores.json", "calibration.jsonl"),
    ),
    "search": Stage(
        "search",
        (
            "--library=runs/library",
            "--scores=runs/score",
            "--objective.window_metric=null",
            "--constraints.limits={}",
            "--constraints.sweep=[]",
            "--constraints.targets=[{scenario: {gpu: cpu, num_gpus: 1, prompt_tokens: 96, generated_tokens: 48, "
            "kv_dtype: bfloat16, expert_dtype: bfloat16}, budget: {throughput_over_parent: 1.01}}]",
        ),
        ("parent", "runs/library", "runs/score"),
        ("plan.json",),
    ),
    "assemble": Stage(
        "assemble",
        ("--parent=parent", "--plan=runs/search/plan.json"),
        ("parent", "runs/search"),
        ("child/*",),
    ),
    "precompute_logits": Stage(
        "precompute_logits",
        ("--parent=parent", "--documents=runs/generate/documents", "--top_k=4", "--fabric.accelerator=cpu"),
        ("parent", "runs/generate"),
        ("top_logits/*",),
    ),
    "distill": Stage(
        "distill",
        (
            *trainer(BEST),
            "--model.init_args.child=child",
            "--model.init_args.parent=parent",
            "--model.init_args.optimizer.init_args.lr=0.02",
            "--model.init_args.evaluation.prompts_per_effort=2",
            "--model.init_args.evaluation.max_new_tokens=8",
            "--data.init_args.documents=runs/generate/documents",
            "--data.init_args.sequence_tokens=128",
            "--data.init_args.batch_size=2",
            "--data.init_args.validation_one_in=4",
        ),
        ("parent", "child", "runs/generate"),
        ("child/*",),
    ),
    "distill_blocks": Stage(
        "distill_blocks",
        (
            *trainer(),
            "--model.init_args.parent=parent",
            "--model.init_args.library=runs/library",
            "--data.init_args.documents=runs/generate/documents",
            "--data.init_args.sequence_tokens=128",
            "--data.init_args.validation_one_in=4",
        ),
        ("parent", "runs/library", "runs/generate"),
        ("library/*",),
    ),
    "rl_recover": Stage(
        "rl_recover",
        (
            *trainer(),
            "--model.init_args.child=child",
            "--model.init_args.optimizer.init_args.lr=0.02",
            "--model.init_args.grpo.num_generations=4",
            "--model.init_args.grpo.completions_per_device=16",
            "--model.init_args.grpo.sampling.temperature=1.3",
            "--data.init_args.efforts={low: 1.0}",
            "--model.init_args.grpo.sampling.max_new_tokens=16",
            "--model.init_args.evaluation.prompts_per_effort=2",
            "--data.init_args.train_prompts=32",
            "--data.init_args.held_out_per_effort=2",
        ),
        ("child",),
        ("child/*",),
    ),
    "calibrate_kv": Stage(
        "calibrate_kv",
        ("--model.init_args.checkpoint=child", "--trainer.accelerator=cpu", *CALIBRATION),
        ("child",),
        ("kv_scales.safetensors", "kv_scales.json", "calibration.jsonl"),
    ),
    "export": Stage(
        "export",
        ("--checkpoint=child", "--kv_scales=null", "--card.parent=none"),
        ("child",),
        ("model/*",),
    ),
    "evaluate": Stage(
        "evaluate",
        (
            "--checkpoint=child",
            "--held_out.prompts_per_effort=2",
            "--sampling.max_new_tokens=16",
            "--engine.batch_size=8",
        ),
        ("child",),
        ("episodes.parquet", "generation_lengths.json"),
    ),
}


class World:
    """The folders that stages read: `parent`, `child` and `runs/STAGE`, each made when a trial first needs it.

    Args:
        server: runs the stages.
        folder: an empty folder.
    """

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self.folder = folder
        for name in ("parent", "child"):
            shutil.copytree(ASSETS / f"tiny_{name}", folder / name)

    def require(self, name: str) -> Path:
        """Return a folder of the world, after the run of the stage that makes it."""
        if not (self.folder / name).is_dir():
            stage = STAGES[name.removeprefix("runs/")]
            for read in stage.inputs:
                self.require(read)
            output = str(self.folder / f"{stage.recipe}.txt")
            [end] = self.server.run(Run(stage.command(run_dir=name), str(self.folder), output, limit_seconds=300))
            assert end.status == 0, end.said
        return self.folder / name

    def copy(self, names: Iterable[str], folder: Path) -> Path:
        """Copy folders of the world to a new folder."""
        folder.mkdir(parents=True)
        for name in names:
            shutil.copytree(self.require(name), folder / name)
        return folder
