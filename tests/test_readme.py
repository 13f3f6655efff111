"""The README's commands work: each is run, or, where it would take minutes, resolved and checked."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.shown_commands import shown_commands

from lit_puzzle.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
WORDS = shown_commands(README)


def test_readme_shows_the_two_commands_that_set_everything_up() -> None:
    assert ["bash", "scripts/quickstart.sh"] in WORDS and ["bash", "scripts/test.sh"] in WORDS


def test_every_shown_command_is_one_that_is_checked_here() -> None:
    assert len(WORDS) > 10 and {words[0] for words in WORDS} == {"bash", "lightning"}


def test_lightning_commands_are_accepted_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # recipes come from the package
    for words in (words[1:] for words in WORDS if words[0] == "lightning"):
        if words[0] == "run" and words[1] != "--help" and "--plan" not in words:
            with pytest.raises(SystemExit) as stopped:
                main([*words, "--print_config"])
            assert stopped.value.code == 0, words
            assert "run_dir: runs/" in capsys.readouterr().out
        else:
            main(words)
            assert capsys.readouterr().out, words


@pytest.mark.parametrize("words", [words for words in WORDS if words[0] == "bash"], ids=" ".join)
def test_script_is_there_and_parses(words: list[str]) -> None:
    subprocess.run(["bash", "-n", ROOT / words[1]], check=True)


def test_readme_is_a_front_page() -> None:
    assert len(README.splitlines()) <= 120
    assert re.findall(r"^## (.+)$", README, flags=re.MULTILINE) == [
        *("Install", "Quick start", "Pipeline", "Your own model", "Results", "Model zoo", "Documentation"),
        *("Status", "Citation", "License"),
    ]
    linked = [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README) if not target.startswith("http")]
    assert len(linked) > 20 and [target for target in linked if not (ROOT / target).exists()] == []


@pytest.mark.slow
def test_quickstart_runs_the_main_job_as_written(tmp_path: Path) -> None:
    """What quickstart.sh types after installing, cut to one update and few prompts."""
    script = (ROOT / "scripts" / "quickstart.sh").read_text()
    (everything, recipe) = re.findall(r"^ +lightning run (\S+) \"\$@\"$", script, flags=re.MULTILINE)
    assert everything == "recipes/pipeline.yaml"
    cut = ["--trainer.max_steps=1", f"--run_dir={tmp_path / 'run'}"]
    cut += ["--model.init_args.evaluation.prompts_per_effort=8", "--data.init_args.held_out_per_effort=8"]
    subprocess.run([sys.executable, "-m", "lit_puzzle", "run", recipe, *cut], check=True, cwd=ROOT)
    assert (tmp_path / "run" / "run.json").is_file()
    assert (tmp_path / "run" / "child" / "model.safetensors").is_file()


@pytest.mark.slow
def test_quickstart_says_what_is_left_out_without_vllm(tmp_path: Path) -> None:
    """The script as it is, in the environment of this test in place of one of its own."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    shutil.copy(ROOT / "scripts" / "quickstart.sh", scripts)
    (scripts / "environment.sh").write_text(f'cd "{tmp_path}"\nexport PATH="{Path(sys.executable).parent}:$PATH"\n')
    command = ["bash", str(scripts / "quickstart.sh"), "--all", "--plan"]
    bare = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "bash scripts/vllm_env.sh" in bare.stderr and "serve_check" in bare.stdout
    (tmp_path / ".venv-vllm" / "bin").mkdir(parents=True)
    (tmp_path / ".venv-vllm" / "bin" / "python").symlink_to(sys.executable)
    assert "vllm_env" not in subprocess.run(command, check=True, capture_output=True, text=True).stderr
