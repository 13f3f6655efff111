"""Ablation of FP8 KV scales on the tiny models: damage of an FP8 cache without scales and with those of each method.

    python scripts/ablations/fp8_kv.py [--seeds 0 1 2] [--folder runs/ablation_fp8_kv]

Models: the embedded child and parent, and three times the parent with some channels of keys and values scaled, undone
in q_proj and o_proj: it computes the same, but its cache overflows FP8, falls below it, or needs a scale for each head.
Calibration: documents that the model itself writes, drawn anew by each seed. Damage of predictions is measured on
documents of another seed, accuracy on held-out problems under the scales of the first seed, paired with the model's own
cache. The cache is simulated in float32 models (`lit_puzzle.kv_cache.fp8_cache`). Ends with tables and a JSON
line.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from lit_puzzle.data.calibration import CALIBRATION_FILE, CalibrationData, RankBatches
from lit_puzzle.data.prompt_source import PromptSource
from lit_puzzle.environments.environment import EFFORTS
from lit_puzzle.evaluate.accuracy import Episode, mean_and_error, solve_problems
from lit_puzzle.evaluate.held_out import held_out_problems
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.kv_cache.calibrate_kv import count_batch
from lit_puzzle.kv_cache.fp8_cache import Fp8Cache, layer_scales
from lit_puzzle.kv_cache.kv_statistics import KVStatistics, Scales, ScaleSettings, find_scales
from lit_puzzle.kv_cache.quality_loss import add_outliers, kv_quality_loss
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.loading import load_model
from lit_puzzle.run.folder import PACKAGE
from lit_puzzle.tiny.world import Chains, Counting, Sorting

ASSETS = PACKAGE / "assets"
FAMILIES = (Chains(), Sorting(), Counting())
EVERY_CHANNEL = range(16)  # below half a head of 32
DAMAGE_SEED = 100
# name -> (checkpoint, factor, channels, heads): arguments of `add_outliers`
MODELS: dict[str, tuple[Path, float, Sequence[int], Sequence[int] | None]] = {
    "child": (ASSETS / "tiny_child", 1.0, [], None),
    "parent": (ASSETS / "tiny_parent", 1.0, [], None),
    "parent, 2 of 16 channels x 1024": (ASSETS / "tiny_parent", 2.0**10, [0, 7], None),
    "parent, every channel / 4096": (ASSETS / "tiny_parent", 2.0**-12, EVERY_CHANNEL, None),
    "parent, one head / 16384": (ASSETS / "tiny_parent", 2.0**-14, EVERY_CHANNEL, [0]),
}
METHODS: dict[str, ScaleSettings | None] = {
    "no scales": None,
    "amax, power of two (default)": ScaleSettings(),
    "amax, unrounded": ScaleSettings(rounding="none"),
    "percentile 99.99": ScaleSettings("percentile"),
    "percentile 99": ScaleSettings("percentile", percent=99.0),
    "mse, power of two": ScaleSettings("mse"),
    "mse, unrounded": ScaleSettings("mse", rounding="none"),
    "amax, per head": ScaleSettings(per_head=True),
    "amax, windowed layers as they are": ScaleSettings(windowed_layers="bf16"),
}
Rows = dict[str, dict[str, list[float]]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation_fp8_kv"))
    parser.add_argument("--prompts", type=int, default=256, help="held-out problems at each effort")
    arguments = parser.parse_args()
    found = {}
    for name in MODELS:
        found[name] = one_model(name, arguments.folder, arguments.seeds, arguments.prompts)
        print_table(name, found[name])
    print(json.dumps(found))


def one_model(name: str, folder: Path, seeds: Sequence[int], prompts: int) -> Rows:
    """Method -> damage under the scales of each seed, and accuracy."""
    checkpoint, factor, channels, heads = MODELS[name]
    model = load_model(checkpoint, "float32").eval()
    add_outliers(model, factor, channels, heads)
    apart = documents(folder, checkpoint, DAMAGE_SEED, num_prompts=128)
    scales_of = {seed: every_scale(model, checkpoint, documents(folder, checkpoint, seed)) for seed in seeds}
    quality_losses: dict[str, dict[str, float]] = {}  # of each set of scales: many methods and seeds agree
    episodes: dict[str, list[Episode]] = {}
    own = solve(model, checkpoint, prompts, None)
    rows: Rows = {}
    for method in METHODS:
        rows[method] = {}
        for seed in seeds:
            scales = scales_of[seed][method]
            if str(scales) not in quality_losses:
                quality_losses[str(scales)] = kv_quality_loss(model, apart, scales)
            for key, value in quality_losses[str(scales)].items():
                rows[method].setdefault(key, []).append(value)
        scales = scales_of[seeds[0]][method]
        if str(scales) not in episodes:
            episodes[str(scales)] = solve(model, checkpoint, prompts, scales)
        after = episodes[str(scales)]
        rows[method]["accuracy"] = list(mean_and_error([episode.correct for episode in after]))
        changes = [b.correct - a.correct for a, b in zip(own, after, strict=True)]
        rows[method]["accuracy_change"] = list(mean_and_error(changes))
    rows["model's own cache"] = {"accuracy": list(mean_and_error([e.correct for e in own]))}
    return rows


def documents(folder: Path, checkpoint: Path, seed: int, num_prompts: int = 384) -> list[Mapping[str, Tensor]]:
    """Batches of documents generated by a checkpoint, kept in a folder."""
    data = CalibrationData(checkpoint, PromptSource(list(FAMILIES), num_prompts=num_prompts, seed=seed))
    place = folder / f"{checkpoint.name}_{seed}"
    if not (place / CALIBRATION_FILE).is_file():
        place.mkdir(parents=True, exist_ok=True)
        data.write_sequences(place, "cpu")
    return list(RankBatches(data.read_batches(place), 0, 1))


def every_scale(
    model: PreTrainedModel, checkpoint: Path, batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, list[Scales | None]]:
    """Method -> scales; without any they are 1."""
    windows = [window for _, window in Checkpoint(checkpoint).blocks]
    counted = {per_head: KVStatistics(model, per_head) for per_head in (False, True)}
    for statistics_ in counted.values():
        for batch in batches:
            count_batch(model, batch, statistics_)
    found: dict[str, list[Scales | None]] = {}
    for method, settings in METHODS.items():
        if settings is None:
            found[method] = [(torch.tensor(1.0), torch.tensor(1.0))] * len(windows)
        else:
            found[method] = layer_scales(find_scales(counted[settings.per_head], settings, windows, ""))
    return found


def solve(
    model: PreTrainedModel, checkpoint: Path, prompts: int, scales: Sequence[Scales | None] | None
) -> list[Episode]:
    """Greedy completions of held-out problems under an FP8 cache; None: under the model's own."""
    problems = held_out_problems(list(FAMILIES), list(EFFORTS), prompts, seed=0)
    make_cache = None if scales is None else partial(Fp8Cache, model.config, scales)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    engine = TransformersEngine(model, tokenizer, 128, make_cache)
    return solve_problems(engine, tokenizer, problems, list(FAMILIES), Sampling(96, temperature=0.0))


def print_table(name: str, rows: Rows) -> None:
    """KL in thousandths of a nat; the mean over seeds, the lowest and the highest; accuracy of the first seed."""
    accuracy, error = rows["model's own cache"]["accuracy"]
    print(f"\n### {name}: accuracy {accuracy:.3f} ± {error:.3f} as it is\n")
    print("| scales | KL x 1000 | lowest, highest seed | log-prob x 1000 | other top token | accuracy | change |")
    print("|---|---|---|---|---|---|---|")
    for method in METHODS:
        row = rows[method]
        kl, se = 1000 * statistics.mean(row["kl"]), 1000 * statistics.mean(row["kl_se"])
        spread = f"{1000 * min(row['kl']):.3g}, {1000 * max(row['kl']):.3g}"
        gain, other = 1000 * statistics.mean(row["log_prob"]), 100 * statistics.mean(row["top1"])
        (accuracy, _), (change, error) = row["accuracy"], row["accuracy_change"]
        cells = [f"{kl:.3g} ± {se:.2g}", spread, f"{gain:+.3g}", f"{other:.2f}%", f"{accuracy:.3f}"]
        print(f"| {method} | {' | '.join(cells)} | {change:+.3f} ± {error:.3f} |", flush=True)


if __name__ == "__main__":
    main()
