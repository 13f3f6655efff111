"""What `footprint.py` measures of stages that hold no model: library, search, assemble, average and export.

On the parents of `footprint_stages.py` these hold a few MiB, as much as the process itself gives and takes. Their
parents here are shaped so that what the formula counts is more than that, and grows at least fourfold: many candidates
(library, search), many tensors (assemble), large tensors (average, export). Weights are random, in bfloat16 but for two
exports: experts packed from float32, and everything rounded from it.
"""

import shutil
from pathlib import Path

from footprint_stages import SHAPE

COPIES = ("library", "search", "assemble", "average", "export", "export_packed", "export_rounded")
IN_FLOAT32 = ("export_packed", "export_rounded")
# layers, experts, hidden = inner channels, by size
SHAPES = {
    "library": ((12, 128, 32), (24, 128, 32), (50, 128, 32)),
    "search": ((10, 128, 32), (20, 128, 32), (56, 128, 32)),
    "assemble": ((250, 8, 64), (500, 8, 64), (1500, 8, 64)),
    "average": ((2, 8, 512), (2, 32, 512), (2, 64, 768)),
    "export": ((1, 32, 512), (1, 64, 640), (1, 128, 768)),
    "export_packed": ((1, 32, 512), (1, 64, 640), (1, 128, 768)),
    "export_rounded": ((1, 32, 512), (1, 64, 640), (1, 128, 768)),
}
EXPORTS = {"export": "experts=mxfp4", "export_packed": "experts=mxfp4", "export_rounded": "dtype=bfloat16"}
EVERY_COUNT = list(range(1, 128))
WINDOWS, SEARCHED_WINDOWS = [16, 32, 64, 1024], [64, 1024]
KEPT_SHARE = 0.7  # of the parent's parameters, in a search
GAP = 0.05  # at which the search stops: the solver's tree, which no formula knows, stays small


def copies(folder: Path, size: int) -> dict[str, tuple[str, list[str]]]:
    """Return the recipe and the overrides of every stage."""
    parents = {stage: folder / stage / f"size_{size}" / "parent" for stage in COPIES}
    experts = SHAPES["assemble"][size][1]
    first, importance = parents["average"], {stage: path.with_name("importance") for stage, path in parents.items()}
    manual = [f"--manual.importance={importance['assemble']}", f"--manual.experts={experts // 2}", "--plan=null"]
    searched, scored = (parents["search"].with_name(name) for name in ("library", "scores"))
    limits = f"--constraints.limits={{total_parameters: {_parameters(SHAPES['search'][size])}}}"
    return {
        "library": (
            "library",
            [
                f"--parent={parents['library']}",
                f"--importance={importance['library']}",
                f"--experts={EVERY_COUNT}",
                f"--windows={WINDOWS}",
            ],
        ),
        "search": (
            "search",
            [
                f"--library={searched}",
                f"--scores={scored}",
                limits,
                "--constraints.sweep=[1.0, 1.02]",
                f"--solver.relative_gap={GAP}",
            ],
        ),
        "assemble": ("assemble", [f"--parent={parents['assemble']}", *manual]),
        "average": ("average", [f"--first={first}", f"--second={first.with_name('second')}", "--sweep=null"]),
        **{
            name: ("export", [f"--checkpoint={parents[name]}", "--kv_scales=null", f"--storage.{setting}"])
            for name, setting in EXPORTS.items()
        },
    }


def _parameters(shape: tuple[int, int, int]) -> int:
    layers, experts, hidden = shape
    return int(KEPT_SHARE * layers * experts * 3 * hidden * hidden)


def make_copy_inputs(folder: Path, stage: str, size: int) -> None:
    """Write the parent of a stage and what it reads beside it."""
    import torch

    from lit_puzzle.importance.importance_file import Importance
    from lit_puzzle.library.candidates import library
    from lit_puzzle.model.checkpoint import fingerprint

    home = folder / stage / f"size_{size}"
    layers, experts, _ = SHAPES[stage][size]
    torch.manual_seed(size)
    write_parent(home / "parent", SHAPES[stage][size], "float32" if stage in IN_FLOAT32 else "bfloat16")
    if stage == "average":
        write_parent(home / "second", SHAPES[stage][size])
    scores = tuple(torch.rand(experts, dtype=torch.float64) for _ in range(layers))
    (home / "importance").mkdir()
    Importance(fingerprint(home / "parent"), "random", 1, scores).save(home / "importance")
    if stage == "search":
        (home / "library").mkdir()
        library(home / "library", home / "parent", home / "importance", EVERY_COUNT, SEARCHED_WINDOWS)
        _write_scores(home)


def write_parent(folder: Path, shape: tuple[int, int, int], dtype: str = "bfloat16") -> None:
    """Write a random parent: layers, experts, hidden = inner channels."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    from lit_puzzle.tiny.tokenizer import build_tokenizer

    layers, experts, width = shape
    tokenizer = build_tokenizer()
    sizes = {
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "hidden_size": width,
        "intermediate_size": width,
    }
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = GptOssForCausalLM(GptOssConfig(**SHAPE | sizes, **ends)).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_scores(home: Path) -> None:
    """Write scores that fall with the number of experts and the width of the window."""
    from lit_puzzle.library.library import Library
    from lit_puzzle.scoring.score_files import entries_of
    from lit_puzzle.scoring.scores import Measurement, Scores

    made, entries = Library.load(home / "library"), {}
    for entry in entries_of(made, pairs=False):
        size = entry.block.num_experts if entry.kind == "experts" else entry.block.window_tokens or 1
        loss = Measurement((1 + entry.layer) / size)
        entries[entry.layer, entry.name] = {"kl": loss, "long_context": loss}
    (home / "scores").mkdir()
    Scores(made.parent_fingerprint, 1, 1, entries).save(home / "scores")


def is_made(folder: Path, stage: str, size: int) -> bool:
    """Return whether the inputs of a stage are there; remove what an interrupted bench has left."""
    home = folder / stage / f"size_{size}"
    last = home / ("scores/scores.json" if stage == "search" else "importance/importance.json")
    if not last.is_file():
        shutil.rmtree(home, ignore_errors=True)
    return last.is_file()
