"""The README's commands work: each is run, or, where it would take minutes, resolved and checked."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lit_puzzle.cli import main

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
WORDS = [shlex.split(line, comments=True) for line in COMMANDS]


def test_readme_shows_the_two_commands_that_set_everything_up():
    assert ["bash", "scripts/quickstart.sh"] in WORDS and ["bash", "scripts/test.sh"] in WORDS


def test_lightning_commands_are_accepted_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # recipes come from the package
    for words in (words[1:] for words in WORDS if words[0] == "lightning"):
        if words[0] == "run" and words[1] != "--help":
            with pytest.raises(SystemExit) as stopped:
                main([*words, "--print_config"])
            assert stopped.value.code == 0, words
            assert "run_dir: runs/" in capsys.readouterr().out
        else:
            main(words)
            assert capsys.readouterr().out, words


@pytest.mark.parametrize("words", [words for words in WORDS if words[0] == "bash"], ids=" ".join)
def test_script_is_there_and_parses(words):
    subprocess.run(["bash", "-n", ROOT / words[1]], check=True)


def test_quickstart_runs_the_main_job_as_written(tmp_path):
    """What quickstart.sh types after installing, cut to one update and few prompts."""
    script = (ROOT / "scripts" / "quickstart.sh").read_text()
    (recipe,) = re.findall(r"^ +lightning run (\S+) \"\$@\"$", script, flags=re.MULTILINE)
    cut = ["--trainer.max_steps=1", f"--run_dir={tmp_path / 'run'}"]
    cut += ["--model.init_args.evaluation.prompts_per_effort=8", "--data.init_args.held_out_per_effort=8"]
    subprocess.run([sys.executable, "-m", "lit_puzzle", "run", recipe, *cut], check=True, cwd=ROOT)
    assert (tmp_path / "run" / "run.json").is_file()
    assert (tmp_path / "run" / "child" / "model.safetensors").is_file()
