"""The best token throughput of a parent and its child in one scenario: measured, predicted, or stated by somebody.

Reads two checkpoint folders; config.json alone where there are no weights, which predictions do not need. Writes
`throughput.json`: both numbers, every batch size that was tried, how and where.
The three sources never mix: the numbers of one file have one source, which the file and every report name.
Source: arXiv 2602.11937 (the best throughput over batch sizes counts).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.engine import ServingEngine
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.roofline import Roofline
from lit_puzzle.costs.serving import KernelTimes, parent_blocks
from lit_puzzle.costs.throughputs import THROUGHPUT_FILE, Throughputs
from lit_puzzle.model.identity import checkpoint_identity, config_identity
from lit_puzzle.run.files import read_json, write_json
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.identity import file_identity
from lit_puzzle.run.inputs import claim_inputs, record_output
from lit_puzzle.spec import Scenario


class ThroughputSource(Protocol):
    """Where throughputs come from; your own class is named by `class_path`."""

    def throughputs(self, run_dir: Path, parent: Path, child: Path) -> Throughputs:
        """Return the best throughput of both checkpoint folders; `run_dir` is there for logs."""


class Stated:
    """Numbers that somebody else measured or published.

    Args:
        parent: generated tokens per second of the parent.
        child: those of the child.
        scenario: hardware, engine, lengths, and who says so.
    """

    def __init__(self, parent: float, child: float, scenario: str) -> None:
        self.found = Throughputs(parent, child, "stated", scenario)

    def throughputs(self, run_dir: Path, parent: Path, child: Path) -> Throughputs:
        """Return the numbers as they were given."""
        return self.found


class Predicted:
    """Numbers of the cost model, at the best batch size and deployment of each model.

    Args:
        scenario: GPUs, lengths and number formats; the same for both models.
        times: source of kernel times; default: the roofline.
        engine: settings of the serving engine.
    """

    def __init__(
        self, scenario: Scenario, times: KernelTimes | None = None, engine: ServingEngine | None = None
    ) -> None:
        self.scenario, self.times, self.engine = scenario, times or Roofline(), engine

    def throughputs(self, run_dir: Path, parent: Path, child: Path) -> Throughputs:
        """Return the predictions.

        Raises:
            ValueError: a model that does not fit, or a scenario that the source of times does not know.
        """
        configs = {"parent": read_json(parent / "config.json"), "child": read_json(child / "config.json")}
        shape = ModelShape.from_config(configs["parent"])
        costs = CostModel(shape, self.scenario, self.times, self.engine)
        best = {name: costs.best(parent_blocks(config)) for name, config in configs.items()}
        scenario = self.scenario
        text = (
            f"{scenario.num_gpus} x {scenario.gpu}, {scenario.prompt_tokens} prompt and {scenario.generated_tokens} "
            f"generated tokens, KV cache {scenario.kv_dtype}; cost model, times: {self.times.name}; batch of a replica "
            f"{best['parent'].batch_size} and {best['child'].batch_size}"
        )
        found = {name: prediction.tokens_per_second for name, prediction in best.items()}
        return Throughputs(found["parent"], found["child"], "predicted", text)


def throughput(run_dir: Path, parent: Path, child: Path, source: ThroughputSource) -> dict[str, float]:
    """Find the best token throughput of a parent and its child.

    Args:
        run_dir: the run's folder; gets `throughput.json`.
        parent: checkpoint folder of the parent.
        child: checkpoint folder of the child.
        source: where the numbers come from.

    Returns:
        `tokens_per_second/parent|child`, their `speed_up`.

    Raises:
        ValueError: missing folders, or what the source refuses.
    """
    folders = {"parent": require_input(parent, "parent", "config.json")}
    folders["child"] = require_input(child, "child", "config.json")
    identities = {
        name: checkpoint_identity(folder) if any(folder.glob("*.safetensors")) else config_identity(folder)
        for name, folder in folders.items()
    }
    claim_inputs(run_dir, identities)
    found = source.throughputs(run_dir, folders["parent"], folders["child"])
    write_json(run_dir / THROUGHPUT_FILE, asdict(found))
    record_output(run_dir, "throughput", file_identity(run_dir, [THROUGHPUT_FILE]))
    _print(found)
    return {
        "tokens_per_second/parent": found.parent,
        "tokens_per_second/child": found.child,
        "speed_up": found.child / found.parent,
    }


def _print(found: Throughputs) -> None:
    table = Table("batch", "parent", "child", "child / parent", title=f"Generated tokens per second ({found.kind})")
    rows: dict[str, Mapping[str, Any]] = {**found.tried, "best": {"parent": found.parent, "child": found.child}}
    for name, row in rows.items():
        table.add_row(name, f"{row['parent']:,.4g}", f"{row['child']:,.4g}", f"{row['child'] / row['parent']:.3f}")
    console = Console()
    console.print(table)
    console.print(found.scenario, soft_wrap=True)
