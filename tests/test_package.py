"""The package: the wheel is complete, dependencies are those imported, and what must be light imports nothing heavy."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lit_puzzle"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]


ON_DEMAND = (
    "graders",
    "harmony",
    "lm-eval",
    "reasoning-gym",
    "sandbox",
    "server",
)  # extras that are imported where a recipe needs them


def files_of(folder: Path) -> dict[str, int]:
    """Path -> size of every file under a folder, through its links; byte code left out."""
    paths = (Path(place) / name for place, _, names in os.walk(folder, followlinks=True) for name in names)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths if path.suffix != ".pyc"}


@pytest.mark.slow
def test_the_wheel_carries_every_file_and_works_alone(tmp_path):
    ignored = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "site", "*.egg-info", "__pycache__", ".*_cache")
    source = shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=ignored)
    subprocess.run([*PIP, "--no-build-isolation", "--target", tmp_path / "site", source], check=True)
    installed = files_of(tmp_path / "site" / "lit_puzzle")
    assert installed == files_of(PACKAGE)
    assert sum(installed.values()) < 10_000_000
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    run = [sys.executable, "-P", "-m", "lit_puzzle"]
    listed = subprocess.check_output([*run, "recipes"], cwd=tmp_path, env=environment, text=True)
    assert "recipes/rl_recover.yaml" in listed.split()
    words = ["run", "recipes/gpt_oss_120b/search.yaml", "--print_config"]
    resolved = subprocess.check_output([*run, *words], cwd=tmp_path, env=environment, text=True)
    assert yaml.safe_load(resolved)["command"] == "search"


HEAVY = ("torch", "lightning", "transformers")
RUN_A_MODEL = {"costs.block_timing", "costs.filled_cache", "costs.interleaved_timer", "costs.machine"}
LIGHT = {
    *("spec", "cli", "library.library", "scoring.scores", "generation.sampling", "generation.engine"),
    *("model.layout", "model.family", "model.chat", "environments.environment"),
}


def light_modules() -> list[str]:
    """What plans, costs, searches and reads recipes: whole rooms, all settings, and the modules of LIGHT."""
    rooms = [path for room in ("run", "costs", "search", "report") for path in (PACKAGE / room).rglob("*.py")]
    found = [path.relative_to(PACKAGE).with_suffix("") for path in [*rooms, *PACKAGE.rglob("*settings.py")]]
    names = {".".join(path.parts).removesuffix(".__init__") for path in found} - RUN_A_MODEL
    return sorted(f"lit_puzzle.{name}" for name in names | LIGHT)


def test_light_modules_import_none_of_the_heavy_libraries():
    code = f"""
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    heavy = [library for library in {HEAVY} if library in sys.modules]
    assert not heavy, f"{{name}} imports {{heavy}}"
"""
    assert len(light_modules()) > 40
    subprocess.run([sys.executable, "-c", code, *light_modules()], check=True)


def required(group: str | None = None) -> set[str]:
    """Names of the distributions that the package, or one of its extras, asks for."""
    listed = PROJECT["dependencies"] if group is None else PROJECT["optional-dependencies"][group]
    return {re.split(r"[\[<>=]", requirement)[0].lower() for requirement in listed} - {"lit-puzzle"}


def imported() -> set[str]:
    """Names of the distributions that any file of the package imports, at its top or in a function."""
    found = set()
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "callbacks").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).split(".")[0])
    names = packages_distributions()
    third = found - sys.stdlib_module_names - {"lit_puzzle"}
    return {names.get(name, [name])[0].lower().replace("_", "-") for name in third}


def test_dependencies_are_what_the_package_imports():
    optional = {"vllm", "wandb"}.union(*map(required, ON_DEMAND))
    assert imported() - optional == required()
    assert "vllm" in required("vllm") and optional <= imported()


@pytest.mark.parametrize("group", PROJECT["optional-dependencies"])
def test_extras_do_not_repeat_the_dependencies(group):
    assert not required(group) & required()
