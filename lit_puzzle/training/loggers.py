"""Loggers of a run: a CSV file, and with it TensorBoard or Weights & Biases. One key of a recipe chooses.

    trainer.logger: lit_puzzle.training.loggers.CSV            <run>/logs/metrics.csv
                    lit_puzzle.training.loggers.TensorBoard    and <run>/logs/tensorboard
                    lit_puzzle.training.loggers.WandB          and <run>/logs/wandb, offline unless said

The CSV file is the record. A resumed run cuts it back to the checkpoint; what TensorBoard and an offline W&B run show
is made anew from it. So a run that was killed shows every step once, and may change its logger when it is resumed.
Lightning's own loggers (`lightning.pytorch.loggers`) work, too; they begin a new log in every attempt.

Writes the folder `logs` of the run. Disk: 20 bytes a number in the CSV file, 50 in the others.
"""

from argparse import Namespace
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from shutil import rmtree
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lit_puzzle.run.files import read_text, write_atomically
from lit_puzzle.training.metrics_file import MetricsFile, Row

FOLDER, METRICS_FILE = "logs", "metrics.csv"


class CSV(Logger):
    """Logs into `<save_dir>/logs/metrics.csv`.

    A metric is logged once a step: what a step logs again is left out.

    Args:
        save_dir: the run folder.
    """

    def __init__(self, save_dir: Path) -> None:
        super().__init__()
        self.folder = Path(save_dir) / FOLDER
        self._file: MetricsFile | None = None  # opened by the first row: its step is where a resumed run continues
        self._step, self._known = -1, set[str]()

    @property
    def name(self) -> str:
        """Name of the log."""
        return FOLDER

    @property
    def version(self) -> str:
        """A run has one log."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.folder.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Log nothing: the recipe is in `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of a step."""
        step = step or 0
        if self._file is None:
            self._file = self._begin(step)
        if step != self._step:
            self._step, self._known = step, set()
        values = {name: _number(value) for name, value in metrics.items() if name not in self._known}
        if set(values) - {"epoch"}:
            self._known |= set(values)
            self._file.append(step, values)
            self._show(step, values)

    def _begin(self, step: int) -> MetricsFile:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = MetricsFile(self.folder / METRICS_FILE)
        file.cut(step)
        self._open(step, file.rows())
        return file

    def _open(self, step: int, before: Iterable[Row]) -> None:
        """Open what shows the metrics; `before` are the rows below `step`."""

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        """Show a row that the file has."""


class TensorBoard(CSV):
    """Logs into the CSV file and for TensorBoard: `tensorboard --logdir <run>/logs`.

    Args:
        save_dir: the run folder.

    Raises:
        ValueError: the package is missing.
    """

    def __init__(self, save_dir: Path) -> None:
        _require("tensorboard", "TensorBoard")
        super().__init__(save_dir)
        self._writer: Any = None

    def _open(self, step: int, before: Iterable[Row]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = self.folder / "tensorboard"
        rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(folder, purge_step=0)
        for row in before:
            self._show(*row)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged to the disk."""
        if self._writer is not None:
            self._writer.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the log."""
        if self._writer is not None:
            self._writer.close()


class WandB(CSV):
    """Logs into the CSV file and for Weights & Biases: `wandb sync <run>/logs/wandb/offline-run-*` uploads.

    A resumed run has the id of the run before (`logs/wandb.id`). Offline, its folder takes the place of the one before;
    online, steps that the server has are not sent again.

    Args:
        save_dir: the run folder.
        project: name of the project.
        name: name of the run; None: chosen by W&B.
        offline: whether nothing is sent.

    Raises:
        ValueError: the package is missing.
    """

    def __init__(
        self, save_dir: Path, project: str = "lit_puzzle", name: str | None = None, offline: bool = True
    ) -> None:
        _require("wandb", "WandB")
        super().__init__(save_dir)
        self.project, self.run_name, self.offline = project, name, offline
        self._run: Any = None

    def _open(self, step: int, before: Iterable[Row]) -> None:
        import wandb

        known = self.folder / "wandb.id"
        if not known.exists():
            write_atomically(known, token_hex(4))
        own = read_text(known).strip()
        for folder in (self.folder / "wandb").glob(f"offline-run-*-{own}"):
            rmtree(folder)
        self._run = wandb.init(
            project=self.project,
            name=self.run_name,
            id=own,
            dir=self.folder,
            mode="offline" if self.offline else "online",
            resume=None if self.offline else "allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="trainer/global_step")
        for row in before:
            self._show(*row)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._run.step:
            self._run.log({**values, "trainer/global_step": step}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the log."""
        if self._run is not None:
            self._run.finish(exit_code=0 if status in ("success", "finished") else 1)


def _number(value: float | Tensor) -> float:
    return value.item() if isinstance(value, Tensor) else value


def _require(package: str, logger: str) -> None:
    if find_spec(package) is None:
        raise ValueError(
            f"trainer.logger {logger} needs the package {package}: pip install 'lit-puzzle[loggers]', or choose "
            "lit_puzzle.training.loggers.CSV."
        )
