"""Run recipes whose command is fit or validate: LightningCLI on a flat recipe, inside a run folder.

Reads the recipe's layers; writes `config.yaml`, the files of the module and its callbacks, and `run.json`. Objects are
given by `class_path` and `init_args`; optimizers and schedules are arguments of the module, which builds them on its
trainable parameters.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerStatus

from lit_puzzle.run.identity import Identity
from lit_puzzle.run.inputs import ReadsInputs, claim_inputs, dated
from lit_puzzle.run.open_run import join_run, opened_run
from lit_puzzle.run.parser import RecipeParser, without_unset_date
from lit_puzzle.run.peers import report_failure
from lit_puzzle.run.recipe import Recipe
from lit_puzzle.run.record import RunClock
from lit_puzzle.run.signals import install_handlers
from lit_puzzle.training.loggers import CSV
from lit_puzzle.training.stored_checkpoints import check_checkpoint

LARGEST_SEED = 2**32 - 1  # of numpy's generator


@runtime_checkable
class ReportsResults(Protocol):
    """A LightningModule with headline numbers for run.json; of any other the last logged metrics are recorded."""

    results: dict[str, float]


@runtime_checkable
class FitsLayers(Protocol):
    """A LightningModule that, under a budget (`memory_gib`), trains layer after layer, each in a fit of its own."""

    memory_gib: float | None

    def fit_layers(self, trainer: Trainer, data: LightningDataModule, new_trainer: Callable[[Path], Trainer]) -> None:
        """Fit all layers.

        Args:
            trainer: the run's Trainer, which does not fit itself.
            data: the run's data.
            new_trainer: returns another Trainer of the same settings for a folder.
        """
        ...


class LightningRecipeParser(RecipeParser, LightningArgumentParser):
    """Lightning's parser for a recipe."""


class RecipeCLI(LightningCLI):
    """LightningCLI that parses a recipe and builds its objects, and runs nothing."""

    def __init__(self, recipe: Recipe, words: Sequence[str]) -> None:
        """Parse and instantiate.

        Args:
            recipe: the loaded recipe.
            words: overrides from the command line.

        Raises:
            ValueError: an unknown key, a wrong type, or an object that refuses its arguments.
        """
        self.recipe = recipe
        super().__init__(
            args=recipe.arguments(words),
            run=False,
            save_config_callback=None,
            seed_everything_default=0,
            parser_class=LightningRecipeParser,
            parser_kwargs={"parser_mode": "omegaconf+", "prog": f"lightning run {recipe.path}", "dump_header": None},
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the recipe's own keys; modules find the run folder as `trainer.default_root_dir`."""
        assert isinstance(parser, LightningRecipeParser)
        parser.recipe = self.recipe
        parser.add_argument("--command", type=str, help="fit or validate")
        parser.add_argument("--run_dir", type=str, required=True, help="folder that the run writes")
        parser.add_date()
        parser.link_arguments("run_dir", "trainer.default_root_dir")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; what it refuses is a value of the recipe."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, MisconfigurationException) as error:
            raise ValueError(f"{self.recipe.path}: trainer: {error}") from error

    def new_trainer(self, folder: Path) -> Trainer:
        """Build another trainer of the recipe, with callbacks of its own, for a folder inside the run folder."""
        self.config_init = self.parser.instantiate_classes(self.config)
        trainer = self.instantiate_trainer(default_root_dir=folder)
        for logger in trainer.loggers:
            if isinstance(logger, CSV):  # a log of its own, which stays when the folder goes
                logger.folder = logger.folder / folder.name
        trainer.callbacks.insert(0, OwnSignals())  # type: ignore[attr-defined]
        return trainer

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the given words only; Lightning's own version warns about `sys.argv`.

        Raises:
            ValueError: an argument that is not accepted, or a seed out of range.
        """
        assert isinstance(args, list)
        self.config = parser.parse_args(args)
        seed = self.config.seed_everything
        if isinstance(seed, int) and not 0 <= seed <= LARGEST_SEED:
            raise ValueError(
                f"{self.recipe.path}: seed_everything is {seed}; a seed is a whole number from 0 to {LARGEST_SEED}."
            )


def run_lightning(
    command: str, recipe: Recipe, words: Sequence[str], overwrite: bool, check: Callable[[], None]
) -> None:
    """Run fit or validate of a recipe, resuming an unfinished run.

    Args:
        command: "fit" or "validate".
        recipe: the loaded recipe.
        words: overrides from the command line.
        overwrite: starts anew whatever the run folder contains.
        check: is called before the run folder is claimed, and may refuse the run.

    Raises:
        ValueError: a wrong recipe, a wrong input folder, or a run folder of another recipe.
    """
    cli = RecipeCLI(recipe, words)
    run_dir = Path(cli.config.run_dir)
    config = recipe.on_disk(cli.parser.dump(without_unset_date(cli.config), skip_unset=False), words)
    is_first = _get_rank() in (None, 0)
    if not is_first:
        join_run(run_dir, config)
    check()
    cli.trainer.callbacks.insert(0, OwnSignals())  # type: ignore[attr-defined]
    clock = RunClock()
    opened = opened_run(run_dir, config, overwrite, _has_own_code(recipe)) if is_first else nullcontext(False)
    with dated(cli.config.chat_date), opened as resumed:
        if is_first:
            claim_inputs(run_dir, _inputs(cli))
        try:
            if command == "fit":
                finished = _fit(cli, run_dir)
            else:
                cli.trainer.validate(cli.model, datamodule=cli.datamodule)
                finished = cli.trainer.state.status == TrainerStatus.FINISHED
        except MisconfigurationException as error:  # settings of the Trainer that do not fit together
            raise ValueError(str(error)) from error
        if cli.trainer.is_global_zero and finished:
            clock.close(run_dir, recipe.path, cli.config.seed_everything, resumed, _results(cli))


def _fit(cli: RecipeCLI, run_dir: Path) -> bool:
    """Fit, at once or layer by layer; return whether training has come to its end."""
    if isinstance(cli.model, FitsLayers) and cli.model.memory_gib is not None:
        cli.model.fit_layers(cli.trainer, cli.datamodule, cli.new_trainer)
        return True
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=sound_checkpoint(run_dir))
    return bool(cli.trainer.state.status == TrainerStatus.FINISHED)


class OwnSignals(Callback):
    """Puts the handlers of `lit_puzzle.run.signals` in place of Lightning's, which end a run with exit code 0.

    An error is told to the other processes of the run at once: this is the first of the callbacks.
    Under SLURM, Lightning's stay: they save the state and requeue the job.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers after Lightning has installed its own."""
        self._install(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers for a run of `validate`."""
        self._install(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the other processes, before anything here waits for them in a clean-up."""
        report_failure(exception)

    def _install(self, trainer: Trainer) -> None:
        launcher = trainer.strategy.launcher
        if not SLURMEnvironment.detect():
            install_handlers(launcher.kill if isinstance(launcher, _SubprocessScriptLauncher) else None)


def sound_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest training checkpoint that is complete and undamaged, or None.

    A damaged one is named in a warning and left out. Every process reads all of it, so that all choose the same.

    Raises:
        ValueError: there are checkpoints, and all are damaged: starting anew is not for this command to decide.
    """
    damaged: list[str] = []
    found = sorted((run_dir / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in found:
        try:
            check_checkpoint(path)
        except ValueError as error:
            damaged.append(str(error))
        else:
            for message in damaged:
                print(f"warning: {message}; the checkpoint before it is used.", flush=True)
            return path
    if damaged:
        raise ValueError(f"{damaged[0]}; no other is sound. Restore one, or give --overwrite to start anew.")
    return None


def _has_own_code(recipe: Recipe) -> bool:
    """Return whether a recipe names classes that may write under names of their own."""
    ours = ("lit_puzzle.", "torch.", "lightning.pytorch.callbacks.", "lightning.pytorch.loggers.CSVLogger")
    return any("." in path and not path.startswith(ours) for path in recipe.class_paths())


def _inputs(cli: LightningCLI) -> dict[str, Identity]:
    """Return the inputs of module, data and callbacks."""
    readers = (cli.model, cli.datamodule, *cli.trainer.callbacks)  # type: ignore[attr-defined]
    return {
        name: identity
        for reader in readers
        if isinstance(reader, ReadsInputs)
        for name, identity in reader.input_identities().items()
    }


def _results(cli: LightningCLI) -> dict[str, float]:
    if isinstance(cli.model, ReportsResults):
        return cli.model.results
    return {key: float(value) for key, value in cli.trainer.callback_metrics.items() if isinstance(value, torch.Tensor)}
