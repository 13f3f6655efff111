"""A run that is too big for this machine is refused with the number and the setting to turn, before it begins;
`--force` starts it all the same."""

import json
import re
import shutil
from pathlib import Path

import pytest

from lit_puzzle.cli import STAGES, main
from lit_puzzle.evaluate.accuracy import read_episodes
from lit_puzzle.footprint.at_hand import available_bytes
from lit_puzzle.footprint.plan import make_plan
from lit_puzzle.run.footprint import GIB
from lit_puzzle.run.recipe import load_recipe

PARENT, ROWS = Path("lit_puzzle/assets/tiny_parent"), 6
EVALUATE = "recipes/evaluate.yaml"


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """An evaluation whose completions may be very long, of a parent that ends each after a few dozen tokens."""
    parent = tmp_path / "parent"
    shutil.copytree(PARENT, parent)
    config = json.loads((parent / "config.json").read_text())
    (parent / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2**31 - 1}))
    engine = ("--engine.name=transformers", f"--engine.batch_size={ROWS}")
    held_out = f"--held_out.prompts_per_effort={ROWS // 3}"
    return [f"--run_dir={tmp_path / 'run'}", f"--checkpoint={parent}", held_out, *engine]


def peak_bytes(*words: str) -> float:
    target = STAGES["evaluate"][0]
    plan = make_plan(load_recipe(EVALUATE), "evaluate", target, [*words, "--gpu=cpu", "--gpus=1"])
    assert plan is not None
    return plan.footprint.peak_bytes


def test_a_run_too_big_for_this_machine_is_refused_and_force_starts_it(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = "--sampling.max_new_tokens="
    of_a_token = (peak_bytes(*words, f"{new}{2**21}") - peak_bytes(*words, f"{new}{2**20}")) / 2**20
    long = f"{new}{int(2 * available_bytes() / of_a_token)}"
    run = ["run", EVALUATE, *words, long]
    with pytest.raises(SystemExit):
        main(run)
    said = capsys.readouterr()
    assert said.out.startswith("plan: ")
    needed = re.search(r"evaluate needs ([\d,.]+) GiB \(completions: KV cache ", said.err)
    assert needed is not None
    assert float(needed[1].replace(",", "")) == pytest.approx(peak_bytes(*words, long) / GIB, abs=0.06)
    knob = re.search(rf"completions of {ROWS} rows together: fits at (\d) \((--engine.batch_size=\1)\)", said.err)
    assert knob is not None and peak_bytes(*words, long, knob[2]) < peak_bytes(*words, long)
    assert "--force starts it all the same" in said.err
    assert not (tmp_path / "run").exists()
    main([*run, "--force"])
    assert len(read_episodes(tmp_path / "run")) == ROWS
    assert (tmp_path / "run" / "run.json").is_file()
