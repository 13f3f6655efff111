"""Sample answers: the choice contains every reason, files are found, texts are shown."""

from pathlib import Path

import pytest
from helpers.recorded_runs import answer, started_run

from lit_puzzle.environments.episodes import Episode, write_rows
from lit_puzzle.report.sample_answers import answer_lines, choose, row_files


def run_with(run_dir: Path, answers: dict[str, list[Episode]], texts: bool = True) -> Path:
    started_run(run_dir, {})
    for name, rows in answers.items():
        (run_dir / name).parent.mkdir(exist_ok=True)
        write_rows(run_dir / name, rows, texts)
    return run_dir


def rows_of(reasons: str) -> list[Episode]:
    """Rows by letter: r right, w wrong, c cut off, n no final answer, f failed grader."""
    names = {"r": "right", "w": "wrong", "c": "cut off", "n": "no final answer", "f": "grader failed: ValueError: x"}
    return [answer(row, names[letter]) for row, letter in enumerate(reasons)]


def chosen(reasons: str, count: int) -> list[int]:
    return [episode.row for episode in choose(rows_of(reasons), count)]


def test_reasons_take_turns_and_a_failed_grader_comes_first() -> None:
    assert chosen("wwwwwwwwcnf" + "r" * 6, 3) == [10, 4, 9, 12, 14, 16]
    assert chosen("c" * 90 + "fw", 1) == [90]
    assert chosen("cc", 1) == [1]


def test_rows_are_evenly_spaced_and_the_same_at_every_call() -> None:
    assert chosen("w" * 9 + "r" * 9, 3) == [1, 4, 7, 10, 13, 16] == chosen("w" * 9 + "r" * 9, 3)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 10**9])
def test_never_more_than_there_are_and_none_twice(count: int) -> None:
    rows = chosen("wrrwccnw", count)
    assert len(rows) == min(count, 6) + min(count, 2) and len(set(rows)) == len(rows)


def test_partly_right_answers_are_among_those_that_are_not_right() -> None:
    half = Episode("sums", "low", 1, answer(0).verdict.__class__(0.5, "partly right"), 3)
    assert choose([half, answer(1, "right")], 1) == [half, answer(1, "right")]


def test_a_sample_has_prompt_completion_gold_verdict_tokens_and_ending(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", {"episodes.parquet": [answer(5, "cut off", "4 + 4 =\n\x1b[31m9")]})
    assert answer_lines(run, None, 3, full=False) == [
        "",
        "answers in episodes.parquet: 1 rows: 1 cut off",
        "",
        "  cut off (grade 0): sums, low effort, row 5, problem 1005",
        "    length      12 tokens, cut off at the cap, 0.5 s",
        "    prompt      prompt 5",
        "    completion  4 + 4 =",
        "                \\x1b[31m9",
        "    gold        gold 5",
    ]


def test_long_texts_are_cut_unless_all_is_wanted(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", {"episodes.parquet": [answer(0, completion="x" * 5000)]})
    assert "4,400 characters left out" in "\n".join(answer_lines(run, None, 1, full=False))
    assert "x" * 5000 in "\n".join(answer_lines(run, None, 1, full=True))


def test_the_model_after_training_comes_first_and_others_are_named(tmp_path: Path) -> None:
    answers = {"before": rows_of("ww"), "after": rows_of("r"), ".x": []}
    run = run_with(tmp_path / "run", {f"{folder}/episodes.parquet": rows for folder, rows in answers.items()})
    lines = answer_lines(run, None, 1, full=False)
    assert lines[1:3] == [
        "answers in after/episodes.parquet: 1 rows: 1 right",
        "  other answers: --rows=before/episodes.parquet",
    ]
    for name in ("before", "before/", "before/episodes.parquet"):
        assert answer_lines(run, name, 1, full=False)[1] == "answers in before/episodes.parquet: 2 rows: 2 wrong"
    with pytest.raises(ValueError, match=r"it has after/episodes\.parquet, before/episodes\.parquet"):
        answer_lines(run, "best", 1, full=False)


def test_answers_of_a_run_inside_are_not_taken(tmp_path: Path) -> None:
    run_with(tmp_path / "run" / "inner", {"episodes.parquet": rows_of("r")})
    assert row_files(started_run(tmp_path / "run", {})) == []
    assert answer_lines(tmp_path / "run", None, 3, full=False) == ["", "answers: no graded answers in this folder"]


def test_rows_without_texts_say_so(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", {"episodes.parquet": rows_of("w")}, texts=False)
    assert answer_lines(run, None, 1, full=False)[-1] == "    its texts were not recorded"


def test_a_damaged_row_is_named_and_no_samples_read_none(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", {"episodes.parquet": rows_of("wr")})
    rows = (run / "episodes.parquet").read_bytes()
    (run / "episodes.parquet").write_bytes(rows[:-20])
    with pytest.raises(ValueError, match=r"episodes.parquet cannot be read.*--samples=0 the run is shown without"):
        answer_lines(run, None, 1, full=False)
    assert answer_lines(run, None, 0, full=False) == ["", "answers: in episodes.parquet"]
