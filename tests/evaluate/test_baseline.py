"""A baseline gives its date to the run that is compared with it, and must have the same chat template."""

import json
import shutil
from datetime import date
from pathlib import Path

import pytest

from lit_puzzle.evaluate.alike import check_alike
from lit_puzzle.evaluate.baseline import take_baseline
from lit_puzzle.model.identity import checkpoint_identity
from lit_puzzle.run.folder import INPUTS_FILE, PACKAGE
from lit_puzzle.run.identity import Identity
from lit_puzzle.run.inputs import claim_inputs, run_date

CHILD = PACKAGE / "assets" / "tiny_child"
CLOCK = "Current date: {{ strftime_now('%Y-%m-%d') }}{{ messages[0].content }}"


def evaluated(folder: Path, checkpoint: Path, day: str) -> Path:
    """A run that evaluated a checkpoint on some day."""
    run_date(folder)
    record = json.loads((folder / INPUTS_FILE).read_text()) | {"date": day}
    (folder / INPUTS_FILE).write_text(json.dumps(record))
    claim_inputs(folder, {"checkpoint": checkpoint_identity(checkpoint)})
    return folder


@pytest.fixture
def clocked(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(CHILD, tmp_path / "clocked"))
    (folder / "chat_template.jinja").write_text(CLOCK)
    return folder


def test_the_date_of_the_baseline_is_taken(clocked: Path, tmp_path: Path) -> None:
    baseline = evaluated(tmp_path / "baseline", clocked, "2020-02-29")
    (baseline / "before").mkdir()
    for number, named in enumerate((baseline, baseline / "before")):
        run = tmp_path / f"run{number}"
        take_baseline(run, checkpoint_identity(clocked), named)
        assert run_date(run) == "2020-02-29"


def test_another_date_is_refused_where_the_template_reads_it(clocked: Path, tmp_path: Path) -> None:
    baseline = evaluated(tmp_path / "baseline", clocked, "2020-02-29")
    run = evaluated(tmp_path / "run", clocked, "2021-01-01")
    with pytest.raises(ValueError, match=r"reads the date, which is 2021-01-01 .* and 2020-02-29"):
        take_baseline(run, checkpoint_identity(clocked), baseline)
    (tmp_path / "episodes").mkdir()
    with pytest.raises(ValueError, match=f"is {date.today()} in .* and unknown in the baseline"):
        take_baseline(tmp_path / "fresh", checkpoint_identity(clocked), tmp_path / "episodes")


def test_without_a_clock_any_date_does(tmp_path: Path) -> None:
    baseline, run = (evaluated(tmp_path / name, CHILD, f"202{name[0]}-01-01") for name in ("1a", "2b"))
    take_baseline(run, checkpoint_identity(CHILD), baseline)
    assert run_date(run) == "2022-01-01"


def test_another_chat_template_is_refused(clocked: Path, tmp_path: Path) -> None:
    baseline = evaluated(tmp_path / "baseline", CHILD, "2020-02-29")
    with pytest.raises(ValueError, match="evaluated with another chat template"):
        take_baseline(tmp_path / "run", checkpoint_identity(clocked), baseline)


def test_other_sampling_is_refused_before_anything_is_claimed(tmp_path: Path) -> None:
    """Shorter answers lose accuracy, which would look like a loss of the model."""
    folders = {name: tmp_path / name for name in ("baseline", "run")}
    for tokens, folder in zip((200, 20), folders.values(), strict=True):
        run_date(folder)
        (folder / "config.yaml").write_text(f"command: evaluate\nsampling: {{max_new_tokens: {tokens}}}\n")
    with pytest.raises(ValueError, match=r"sampling of baseline is .*200.*, of run .*20.*: the two cannot be compared"):
        check_alike(folders)
    (folders["run"] / "config.yaml").write_text("command: evaluate\nsampling: {max_new_tokens: 200}\n")
    check_alike(folders, Identity("asked", {"problems": "a"}))  # the baseline has recorded none
    claim_inputs(folders["baseline"], {"held_out": Identity("asked", {"problems": "b"})})
    with pytest.raises(ValueError, match="have other problems, right answers or graders"):
        check_alike(folders, Identity("asked", {"problems": "a"}))
