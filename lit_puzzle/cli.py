"""The console script: `lightning run RECIPE [--key value ...]`, `lightning show RUN`, `lightning recipes [--copy DIR]`.

Reads a recipe and runs its `command`: Lightning for fit and validate, a typed function for every other stage. Wrong
input is one message and exit code 2. Imports nothing heavy, so that `--help` is fast. Other verbs belong to the package
`lightning-sdk`, whose script has the same name, and are passed to it if it is installed.
"""

import faulthandler
import importlib
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import metadata
from pathlib import Path

from jsonargparse import ActionConfigFile, Namespace

from lit_puzzle.footprint.before_run import FORCE, check_fit
from lit_puzzle.footprint.plan import make_plan
from lit_puzzle.footprint.table import plan_json, plan_lines
from lit_puzzle.pipeline.folder import opened_pipeline
from lit_puzzle.pipeline.plan import plan_of_pipeline
from lit_puzzle.pipeline.prepared import prepared
from lit_puzzle.run.closed_pipe import only_prints, reader_may_leave
from lit_puzzle.run.commands import (
    LIGHTNING_COMMANDS,
    PARALLEL_STAGES,
    PIPELINE,
    STAGES,
    command_of,
    stage_list,
    target_of,
)
from lit_puzzle.run.inputs import dated
from lit_puzzle.run.open_run import join_run, opened_run
from lit_puzzle.run.parser import RecipeParser, without_unset_date
from lit_puzzle.run.peers import end_with_starter, failing_together
from lit_puzzle.run.recipe import PACKAGED_RECIPES, Recipe, load_recipe, packaged_recipes
from lit_puzzle.run.record import RunClock
from lit_puzzle.run.renamed import check_names
from lit_puzzle.run.signals import stopped_by_signals
from lit_puzzle.run.user_errors import one_line_errors
from lit_puzzle.run.verify import take_verify, verifying

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK")  # the first that is set is the rank
USAGE = """usage: lightning run RECIPE [--KEY=VALUE ...] [--overwrite] [--verify=fast|full] [--force] [--print_config]
       lightning run RECIPE --plan [--gpus=8 --gpu=H100] [--prompt_tokens=N] [--json] [--KEY=VALUE ...]
       lightning show RUN [--samples=N] [--rows=before|after] [--full]
       lightning recipes [--copy DIR]

RECIPE is a YAML file, on disk or packaged (`lightning recipes` lists those). Its `command` names the stage:
{stages}
  a.b.function      your own typed function `f(run_dir: Path, ...) -> dict[str, float]`

Every key of the recipe can be overridden: --trainer.max_steps=20, --model.init_args.child=DIR.
An incomplete run is resumed by the same command; a complete one needs --overwrite, which removes only what it has made.
The names, shapes and dtypes of a checkpoint's tensors are checked before anything slow. With --verify=fast, the
default, values (NaN, infinities) and checksums (SHA256SUMS) are checked when weights are first read; with --verify=full
all of them are checked first. A recipe can say `verify: full`, too.
`--plan` prints what a recipe costs and starts nothing: memory of every device, disk, network, hours, and what to change
where it does not fit. Inputs need not be there. A run prints its plan in one line first, and is refused if it cannot
fit the device at hand; --force starts it all the same.
`lightning show RUN` prints state, lineage, results and sample answers of a run folder.
`lightning run RECIPE --help` lists the keys of the recipe's command, and `--model.help=CLASS` (likewise --data.help,
--trainer.callbacks.help, ...) those of a class that it names."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line of `lightning`, `lit-puzzle` and `python -m lit_puzzle`.

    Args:
        argv: words after the program's name; default: the command line.

    Raises:
        SystemExit: the input is wrong (code 2, one message), or nobody reads what is printed (code 1).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    hint = ": the same command continues the run." if words[:1] == ["run"] else ""
    with one_line_errors(), stopped_by_signals(hint), reader_may_leave() if only_prints(words) else nullcontext():
        match words:
            case ["run", "-h" | "--help"] | ["run"] | ["-h" | "--help"] | []:
                print(_usage())
            case ["run", recipe, *overrides]:
                run(recipe, overrides)
            case ["show", *options]:
                from lit_puzzle.report.show import show  # it reads tables: pyarrow, which no plan needs

                show(options)
            case ["recipes"]:
                print("\n".join(str(Path("recipes") / path) for path in packaged_recipes()))
            case ["recipes", "--copy", folder]:
                _copy_recipes(Path(folder))
            case ["recipes", *_]:
                raise ValueError(
                    "`lightning recipes` lists the packaged recipes; `--copy DIR` copies them to a new folder."
                )
            case _:
                _hand_to_lightning_sdk(words)


def run(name: str, overrides: Sequence[str]) -> None:
    """Run one recipe.

    Args:
        name: path of the recipe, on disk or packaged.
        overrides: `--key=value` words, `--overwrite` and `--verify`.

    Raises:
        ValueError: anything is wrong with the recipe, its input folders or its run folder.
    """
    recipe, rest, verify = take_verify(load_recipe(name), overrides)
    for folder in (Path.cwd(), recipe.path.resolve().parent):  # a recipe can name modules there; installed ones first
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    words = [word for word in rest if word not in ("--overwrite", FORCE)]
    overwrite, force = "--overwrite" in rest, FORCE in rest
    check_names(recipe, words)
    command = command_of(recipe, words)
    if command == PIPELINE:
        recipe, words = prepared(recipe, words)
        if force:
            raise ValueError("--force is for one stage: run it alone with --force, then rerun the pipeline.")
    if "--plan" in words:
        print_plan(recipe, command, words)
        return
    check = partial(check_fit, recipe, command, target_of(command), words, force) if _rank() == 0 else _no_check
    named = {path.partition(".")[0] for path in recipe.class_paths()}
    if not faulthandler.is_enabled():
        faulthandler.enable(file=2)  # of a crash inside a library, others see only that this process has ended
    end_with_starter(_rank())
    own = command.partition(".")[0] if "." in command else None
    with verifying(verify), one_line_errors(own, named), failing_together():
        if command in LIGHTNING_COMMANDS:
            from lit_puzzle.training.lightning import run_lightning  # lightning and torch load here, not for --help

            run_lightning(command, recipe, words, overwrite, check)
        else:
            run_stage(command, recipe, words, overwrite, check)


def print_plan(recipe: Recipe, command: str, words: Sequence[str]) -> None:
    """Print what a recipe costs, without starting it.

    Raises:
        ValueError: a wrong key, option or device, or a stage of the user's own.
    """
    if command == PIPELINE:
        print("\n".join(plan_of_pipeline(recipe, words)))
        return
    plan = make_plan(recipe, command, target_of(command), words)
    if plan is None:
        raise ValueError(f"{recipe.path}: nobody knows what {command} costs: it is code of your own.")
    print(plan_json(plan) if "--json" in words else "\n".join(plan_lines(plan)))


def _no_check() -> None:
    """Check nothing: the first process has."""


def run_stage(
    command: str, recipe: Recipe, words: Sequence[str], overwrite: bool, check: Callable[[], None] = _no_check
) -> None:
    """Run a stage function with the recipe's keys as its arguments.

    A stage may start further processes, which run the same command line: they join the run folder that the first
    process has claimed, and only the first writes the record.

    Args:
        command: name of a stage or dotted path of a function.
        recipe: the loaded recipe.
        words: overrides from the command line.
        overwrite: whether to remove the run that is there.
        check: is called before the run folder is claimed, and may refuse the run.

    Raises:
        ValueError: the recipe, an input or the run folder is refused.
    """
    function = _stage_function(command, recipe.path)
    parser = RecipeParser(parser_mode="omegaconf+", prog=f"lightning run {recipe.path}")
    parser.recipe, parser.stage = recipe, function
    parser.add_argument("--config", action=ActionConfigFile, help="one more YAML file")
    parser.add_argument("--command", type=str, help="the stage")
    parser.add_argument("--run_dir", type=str, required=True, help="folder that the stage writes")
    parser.add_date()
    parser.add_function_arguments(function, skip={"run_dir"})
    config = parser.parse_args(recipe.arguments(words))
    run_dir = Path(config.run_dir)
    is_first, resolved = _rank() == 0, recipe.on_disk(parser.dump(without_unset_date(config), skip_unset=False), words)
    _keep_card_references(config, recipe, words)
    if not is_first:
        if command in STAGES and command not in PARALLEL_STAGES:
            raise ValueError(f"{command} runs in one process; this one was started as number {_rank()} of several.")
        join_run(run_dir, resolved)
    check()
    clock = RunClock()
    opened: AbstractContextManager[bool] = nullcontext(False)
    if command == PIPELINE:
        opened = opened_pipeline(run_dir, resolved, overwrite)
    elif is_first:
        opened = opened_run(run_dir, resolved, overwrite, command not in STAGES)
    with dated(config.chat_date), opened as resumed:
        arguments = parser.instantiate(Namespace(config.clone()))
        for key in ("config", "command", "run_dir", "chat_date"):
            arguments.pop(key, None)
        results: Mapping[str, float] = function(run_dir=run_dir, **arguments.as_dict())
        if is_first:
            clock.close(run_dir, recipe.path, _seed(config), resumed, results)


def _keep_card_references(config: Namespace, recipe: Recipe, words: Sequence[str]) -> None:
    """Put references to environment variables back into the texts of the model card, which others will read."""
    references = recipe.references(words)
    for key in list(config.keys()) if references else ():
        if key.startswith("card.") and isinstance(config[key], str):
            config[key] = references.restore(config[key], key.rpartition(".")[2])


def _seed(config: Namespace) -> int | None:
    """Return the seed for the record: the stage's own, else that of its prompts or problems."""
    keys = ("seed", "prompts.seed", "held_out.seed")
    return next((config[key] for key in keys if config.get(key) is not None), None)


def _rank() -> int:
    """Return the rank of this process as its launcher gives it, or 0."""
    return next((int(os.environ[name]) for name in RANKS if name in os.environ), 0)


def _stage_function(command: str, recipe_path: Path) -> Callable[..., Mapping[str, float]]:
    dotted = STAGES[command][0] if command in STAGES else command
    module_name, _, function_name = dotted.rpartition(".")
    if not module_name:
        raise ValueError(f"{recipe_path}: command {command!r} does not exist. Stages:\n{stage_list()}")
    try:
        function: Callable[..., Mapping[str, float]] = vars(importlib.import_module(module_name))[function_name]
    except (ModuleNotFoundError, KeyError) as error:
        raise ValueError(f"{recipe_path}: command {command!r} cannot be imported: {error}") from error
    return function


def _usage() -> str:
    return USAGE.format(stages=stage_list())


def _copy_recipes(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder for the recipes.")
    shutil.copytree(PACKAGED_RECIPES, folder, dirs_exist_ok=True)
    print(f"{len(packaged_recipes())} recipes are in {folder}")


def _hand_to_lightning_sdk(words: Sequence[str]) -> None:
    try:
        scripts = metadata.distribution("lightning-sdk").entry_points.select(group="console_scripts", name="lightning")
    except metadata.PackageNotFoundError:
        known = "lit_puzzle knows `run`, `show` and `recipes`; other verbs belong to the lightning-sdk package"
        raise ValueError(f"`lightning {words[0]}`: {known}, which is not installed.\n{_usage()}") from None
    next(iter(scripts)).load()()
