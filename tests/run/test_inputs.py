"""Inputs of a run: claimed once, compared by content on resume, moved without harm; one date a run."""

import json
import threading
from datetime import date
from pathlib import Path

import pytest

from lit_puzzle.run import inputs
from lit_puzzle.run.identity import Identity, file_identity
from lit_puzzle.run.inputs import claim_inputs, run_date, take_date


def test_the_same_inputs_are_taken_and_others_are_named(tmp_path: Path) -> None:
    run, parent = tmp_path / "run", Identity("parents/a", {"weights": "1" * 64, "tokenizer": "2" * 64})
    claim_inputs(run, {"parent": parent})
    claim_inputs(run, {"parent": parent})
    changed = Identity("parents/b", {"weights": "3" * 64, "tokenizer": "2" * 64})
    with pytest.raises(ValueError, match="another parent") as refused:
        claim_inputs(run, {"parent": changed})
    said = str(refused.value)
    assert f"{run} was started with another parent: parents/b (then parents/a)" in said
    assert "weights 333333333333 instead of 111111111111" in said and "tokenizer" not in said
    assert "--overwrite" in said and "\n" not in said
    assert inputs.recorded_inputs(run) == {"parent": parent}  # a refusal changes nothing


def test_a_part_that_appears_or_disappears_is_a_difference(tmp_path: Path) -> None:
    with_template = Identity("a", {"weights": "1", "chat_template": "2"})
    without = Identity("a", {"weights": "1"})
    claim_inputs(tmp_path / "1", {"parent": with_template})
    with pytest.raises(ValueError, match="chat_template none instead of 2"):
        claim_inputs(tmp_path / "1", {"parent": without})
    claim_inputs(tmp_path / "2", {"parent": without})
    with pytest.raises(ValueError, match="chat_template 2 instead of none"):
        claim_inputs(tmp_path / "2", {"parent": with_template})


def test_where_an_input_lies_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    claim_inputs(tmp_path / "run", {"prompts": file_identity(tmp_path / "a.jsonl")})
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    claim_inputs(tmp_path / "run", {"prompts": file_identity(tmp_path / "b.jsonl")})
    assert inputs.recorded_inputs(tmp_path / "run")["prompts"].path == str(tmp_path / "b.jsonl")


def test_inputs_may_be_claimed_in_several_steps(tmp_path: Path) -> None:
    claim_inputs(tmp_path, {"a": Identity("a", {"files": "1"})})
    claim_inputs(tmp_path, {"b": Identity("b", {"files": "2"})})
    with pytest.raises(ValueError, match="another a"):
        claim_inputs(tmp_path, {"a": Identity("a", {"files": "3"})})
    assert inputs.recorded_inputs(tmp_path).keys() == {"a", "b"}


def test_the_date_of_the_first_call_holds(tmp_path: Path) -> None:
    assert run_date(tmp_path / "run") == date.today().isoformat()
    file = tmp_path / "run" / "inputs.json"
    file.write_text(file.read_text().replace(date.today().isoformat(), "2020-02-29"))
    claim_inputs(tmp_path / "run", {"a": Identity("a", {"files": "1"})})
    assert run_date(tmp_path / "run") == "2020-02-29"


def test_processes_that_begin_together_agree_on_the_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    barrier, found = threading.Barrier(8), []

    def start(number: int) -> None:
        partial = tmp_path / f".{number}"
        partial.write_text("x")
        barrier.wait()
        inputs._create_once(tmp_path / "once", f"{number}")
        found.append((tmp_path / "once").read_text())

    monkeypatch.setattr(inputs.os, "getpid", threading.get_ident)
    threads = [threading.Thread(target=start, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1


def test_a_compared_run_takes_the_date_of_the_other_before_it_has_inputs(tmp_path: Path) -> None:
    for name, day in (("other", "2020-02-29"), ("own", "2021-01-01"), ("started", "2021-01-01")):
        run_date(tmp_path / name)
        file = tmp_path / name / "inputs.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"date": day}))
    assert take_date(tmp_path / "own", tmp_path / "other") == "2020-02-29" == run_date(tmp_path / "own")
    claim_inputs(tmp_path / "started", {"a": Identity("a", {"files": "1"})})
    assert take_date(tmp_path / "started", tmp_path / "other") == "2021-01-01"


def test_outputs_are_recorded_by_name(tmp_path: Path) -> None:
    assert inputs.recorded_outputs(tmp_path) == {}
    child = Identity("run/child", {"weights": "1"})
    inputs.record_output(tmp_path, "child", child)
    inputs.record_output(tmp_path, "scales", child)
    assert inputs.recorded_outputs(tmp_path) == {"child": child, "scales": child}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"parent": "a"}', '{"format": 1, "date": "2020-01-01", "inputs": {"a": 1}}']
)
def test_a_damaged_or_foreign_record_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "inputs.json").write_text(text)
    with pytest.raises(ValueError, match=r"inputs\.json") as refused:
        claim_inputs(tmp_path, {})
    assert "--overwrite" in str(refused.value)
