"""The order of the runs that a report finds: by the end in the record, else by the time of the file."""

import os
from pathlib import Path

from helpers.recorded_runs import complete_run

from lit_puzzle.report.found_runs import find_runs
from lit_puzzle.run.files import read_json, write_json


def ended(folder: Path, written: int, **values: str) -> None:
    """A complete run whose record has these values of `ended`, or none, and whose file has a time in seconds."""
    file = complete_run(folder, {}, "a") / "run.json"
    record = read_json(file)
    del record["ended"]
    write_json(file, record | values)
    os.utime(file, (written, written))


def test_the_end_in_the_record_counts_and_without_it_the_time_of_the_file(tmp_path: Path) -> None:
    ended(tmp_path / "first", 4000, ended="1970-01-01T00:16:40+00:00")
    ended(tmp_path / "of_an_older_version", 2000)
    ended(tmp_path / "last", 1000, ended="1970-01-01T00:50:00+00:00")
    ended(tmp_path / "damaged", 5000, ended="yesterday")
    found = find_runs([tmp_path], tmp_path / "report")
    assert [run.folder.name for run in found.complete] == ["last", "of_an_older_version", "first"]
    assert "'yesterday'" in found.left_out[tmp_path / "damaged"]
