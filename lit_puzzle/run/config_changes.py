"""Which keys of a recipe may change when a run is resumed: those that change no result, and where inputs lie.

Compares two resolved recipes; reads and writes nothing. Harmless are the logger, callbacks that only log, how long and
how often (updates, log lines, checkpoints), limits beyond which a training stops, where a server of completions is and
how patient to be with it, and the number of devices of stages whose results do not depend on it. A run folder may be
moved; so may an input, whose content is compared when the stage claims it.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HARMLESS = frozenset(
    {
        *("trainer.logger", "trainer.max_steps", "trainer.max_epochs", "trainer.max_time", "trainer.profiler"),
        *("trainer.log_every_n_steps", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
        *("trainer.enable_checkpointing", "trainer.enable_autolog_hparams", "trainer.default_root_dir"),
        *("trainer.detect_anomaly", "model.init_args.save_every_batches", "run_dir"),
        *("model.init_args.grpo.stop", "model.init_args.grpo.rollouts.max_mismatch"),  # when to stop
        "model.init_args.grpo.rollouts.engine_seconds",
        *(
            f"{of}engine.server.{key}"
            for of in ("", "model.init_args.evaluation.")
            for key in ("url", "concurrency", "retries", "request_seconds", "key_variable")
        ),
    }
)
DEVICES = {"score": ("fabric.devices", "fabric.num_nodes"), "precompute_logits": ("fabric.devices", "fabric.num_nodes")}
LOGGING_CALLBACKS = frozenset(
    {
        *("RichProgressBar", "TQDMProgressBar", "ProgressBar", "RichModelSummary", "ModelSummary"),
        "ProgressLines",
        *("DeviceStatsMonitor", "LearningRateMonitor", "ThroughputMonitor", "Timer"),
    }
)
CHECKPOINTS = {  # class -> arguments that say only how often and how many
    "UpdateCheckpoint": ("every_n_updates", "keep"),
    "ModelCheckpoint": ("every_n_train_steps", "train_time_interval", "every_n_epochs", "save_top_k", "dirpath"),
}
MISSING = "not set"


@dataclass(frozen=True)
class Change:
    """A key that a resumed run has changed.

    Attributes:
        key: the dotted key.
        before: its value in the run that is there.
        now: its value now.
    """

    key: str
    before: Any
    now: Any


def compare_configs(
    before: Mapping[str, Any], now: Mapping[str, Any], inputs: Collection[str]
) -> tuple[str, list[Change]]:
    """Compare the recipe of a run with that of a command that would resume it.

    Args:
        before: the resolved recipe of the run.
        now: the resolved recipe of the command.
        inputs: paths of the inputs that the run has recorded.

    Returns:
        The difference in keys that may not change, as lines of text (empty: there is none), and all changes.
    """
    flat_before, flat_now = _flat(before), _flat(now)
    changes = [
        Change(key, flat_before.get(key, MISSING), flat_now.get(key, MISSING))
        for key in [*flat_now, *(key for key in flat_before if key not in flat_now)]
        if key not in flat_before or key not in flat_now or flat_before[key] != flat_now[key]
    ]
    moved = _with_moved_inputs(before, now, inputs)
    old, new = (yaml.safe_dump(_essential(config), sort_keys=False).splitlines() for config in (before, moved))
    return "\n".join(difflib.unified_diff(old, new, "the run there", "this recipe", n=1, lineterm="")), changes


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, Mapping) and node:
        pairs = [(f"{prefix}{key}", value) for key, value in node.items()]
    elif isinstance(node, list) and node:
        pairs = [(f"{prefix}{index}", value) for index, value in enumerate(node)]
    else:
        return {prefix.removesuffix("."): node}
    return {key: value for name, inside in pairs for key, value in _flat(inside, f"{name}.").items()}


def _with_moved_inputs(before: Any, now: Any, inputs: Collection[str]) -> Any:
    """Return a copy of `now` in which an input that lies elsewhere has its former path."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return {key: _with_moved_inputs(before.get(key), value, inputs) for key, value in now.items()}
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [_with_moved_inputs(*pair, inputs) for pair in zip(before, now, strict=True)]
    if isinstance(before, str) and isinstance(now, str) and before in inputs and Path(now).exists():
        return before
    return now


def _essential(config: Mapping[str, Any]) -> Any:
    """Return a copy of a recipe without what changes no result, and without the place of its run folder."""
    devices = DEVICES.get(str(config.get("command")), ())
    return _pruned(config, "", {*HARMLESS, *devices}, str(config.get("run_dir", "")))


def _pruned(node: Any, prefix: str, harmless: Collection[str], run_dir: str) -> Any:
    if isinstance(node, Mapping):
        pruned = {}
        for key, value in node.items():
            name = f"{prefix}{key}"
            if name not in harmless:
                inside = _callbacks(value) if name == "trainer.callbacks" else value
                pruned[key] = _pruned(inside, f"{name}.", harmless, run_dir)
        return pruned
    if isinstance(node, list):
        return [_pruned(value, prefix, harmless, run_dir) for value in node]
    if isinstance(node, str) and run_dir and (node == run_dir or node.startswith(f"{run_dir}/")):
        return "${run_dir}" + node.removeprefix(run_dir)
    return node


def _callbacks(callbacks: Any) -> Any:
    """Return the callbacks that may change results, without how often they save."""
    kept = []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []:
        name = str(callback.get("class_path", "") if isinstance(callback, Mapping) else "").rpartition(".")[2]
        if name in LOGGING_CALLBACKS:
            continue
        if name in CHECKPOINTS and isinstance(callback.get("init_args"), Mapping):
            arguments = callback["init_args"].items()
            essential = {key: value for key, value in arguments if key not in CHECKPOINTS[name]}
            callback = {**callback, "init_args": essential}
        kept.append(callback)
    return kept
