"""The report of runs as the stages leave them: what it draws, what it says is missing, and how a browser shows it."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, sync_playwright

from lit_puzzle.cli import main
from lit_puzzle.environments.episodes import EPISODES_FILE, Episode, Texts, read_rows, write_rows
from lit_puzzle.environments.verdict import Verdict
from lit_puzzle.importance.importance_file import Importance
from lit_puzzle.run.files import write_json
from lit_puzzle.scoring.scores import Measurement, Scores

ASSETS = Path(__file__).parents[2] / "lit_puzzle" / "assets"
CHROMIUM = shutil.which("chromium")
HOSTILE = "<script>document.title = 'taken'</script> \u202e"


def record(folder: Path, command: str, results: Mapping[str, float | str], **inputs: Path) -> Path:
    """Make a folder a complete run."""
    folder.mkdir(parents=True, exist_ok=True)
    claimed = {name: {"path": str(path), "content": {}} for name, path in inputs.items()}
    write_json(folder / "inputs.json", {"format": 1, "date": "2026-01-31", "inputs": claimed})
    (folder / "config.yaml").write_text(f"command: {command}\nrun_dir: {folder}\n")
    run = {"command": f"lightning run recipes/{command}.yaml", "git_commit": "a" * 40, "results": results}
    write_json(folder / "run.json", run | {"inputs": claimed})
    return folder


def evaluation(folder: Path, longer: int) -> Path:
    efforts = {"low": 5, "medium": 20, "high": 50}
    rows = [
        Episode(
            "chains",
            effort,
            problem,
            Verdict(float(problem % 3 > longer), "right" if problem % 3 > longer else "wrong", looping=False),
            tokens + problem + longer,
            texts=Texts(f"prompt {problem}", HOSTILE, "7"),
        )
        for effort, tokens in efforts.items()
        for problem in range(20)
    ]
    results = {f"accuracy/{effort}": 0.5 for effort in efforts} | {f"accuracy_se/{effort}": 0.1 for effort in efforts}
    record(folder, "evaluate", results | {f"tokens/{effort}": float(tokens) for effort, tokens in efforts.items()})
    write_rows(folder / EPISODES_FILE, rows)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report") / "runs"
    parent, child = evaluation(root / "evaluate_parent", 0), evaluation(root / "evaluate", 1)
    speed = record(root / "throughput", "throughput", {})
    content = {"parent": 10.0, "child": 30.0, "kind": "stated", "scenario": "a machine", "tried": {}}
    write_json(speed / "throughput.json", content)
    folders = {"run_dir": root / "frontier", "parent": parent, "child": child, "throughput": speed}
    words = [f"--{name}={folder}" for name, folder in folders.items()]
    main(["run", "recipes/frontier.yaml", "--resamples=100", *words])
    assembled = record(root / "assemble", "assemble", {}, parent=ASSETS / "tiny_parent")
    shutil.copytree(ASSETS / "tiny_child", assembled / "child")
    scored = record(root / "score", "score", {})
    entries = {(layer, f"experts={n}"): {"kl": Measurement(0.1 / n, 0.01)} for layer in range(6) for n in (4, 8)}
    Scores("f", 10, 100, entries).save(scored)
    important = record(root / "final_kl", "final_kl", {})
    scores = tuple(torch.rand(16).double() + 0.1 for _ in range(6))
    scores[2][5] = torch.nan
    Importance("f", "final_kl", 100, scores, ((), (), (5,), (), (), ())).save(important)
    trained = record(root / "rl_recover", "fit", {"accuracy/low/before": 0.4, "tokens/low/before": 7.0})
    for variant, accuracy in (("searched", 0.5), ("random", 0.25)):
        for seed in range(2):
            values = {"accuracy/low": accuracy + seed / 4, "tokens/low": 7.0}
            record(root / "grid" / f"evaluate-{variant}-{seed}", "evaluate", values)
    log = trained / "lightning_logs" / "version_0"
    log.mkdir(parents=True)
    (log / "metrics.csv").write_text(
        "step,train/reward,val/accuracy/low,val/tokens/low\n0,0.1,,\n1,0.2,0.5,6.5\n2,0.3,0.6,6.25\n"
    )
    return root


def written(runs: Path, folder: Path, *words: str) -> str:
    """Return the page that the command line makes."""
    main(["run", "recipes/report.yaml", f"--run_dir={folder}", f"--folders=[{runs}]", *words])
    return (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def made(runs: Path) -> Path:
    """Return the folder of a report of all runs."""
    written(runs, runs.parent / "made")
    return runs.parent / "made"


def test_every_section_is_drawn_and_names_its_run(runs: Path, made: Path) -> None:
    page = (made / "report.html").read_text()
    titles = [re.sub("<[^>]*>", "", line) for line in page.splitlines() if line.startswith("<h2>")]
    assert titles == [
        *("Requests", "Plan", "Expert importance", "Replace-1-block scores", "Speed"),
        *("KV cache", "Training", "Ablations", "Results of all runs", "Sample completions", "Sources"),
    ]
    assert 'class="missing"' not in page and "http" not in page.replace("http-equiv", "")
    pictures = {path.stem for path in (made / "pictures").iterdir()}
    assert pictures == {"frontier", "plan", "importance", "scores_kl", "kv_cache", "training_1"}
    for number in (
        "<td>0.400</td>",
        "<td>7.0</td>",
        "<td>stated</td>",
        "a machine",
        "0.0125 ± 0.01",
        "Scores by final_kl over 100 tokens",
        "because no token was routed to them: 1.",
        "<td>searched</td><td>2</td><td>0.625 ± 0.125</td>",
        f"commit {'a' * 12}",
    ):
        assert number in page, number
    for run in ("frontier", "assemble", "final_kl", "score", "rl_recover", "evaluate"):
        place = re.search(rf'<a href="#(run-\d+)">{runs / run}</a>', page)
        assert place and f'<tr id="{place[1]}">\n<td>{runs / run}</td>' in page
    results = json.loads((made / "run.json").read_text())["results"]
    assert results == {"runs": 12.0, "sections": 10.0, "missing": 0.0}


def test_numbers_are_those_of_the_frontier(runs: Path, made: Path) -> None:
    page, content = (made / "report.html").read_text(), json.loads((runs / "frontier" / "frontier.json").read_text())
    assert content["verdict"].replace("'", "&#39;") in page
    for effort in ("low", "medium", "high"):
        ends = content["intervals"][f"request_rate/{effort}/ratio"]
        assert f"{content['numbers'][f'request_rate/{effort}/ratio']:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]" in page


def test_texts_of_models_are_text(made: Path) -> None:
    page = (made / "report.html").read_text()
    assert "&lt;script&gt;" in page and "<script" not in page
    assert "\u202e" not in page and "\\u202e" in page


def test_half_of_the_stages_and_what_cannot_be_read(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = tmp_path / "some"
    for name in ("evaluate", "score", "rl_recover"):
        shutil.copytree(runs / name, some / name)
    (some / "score" / "scores.json").write_text('{"entries": []}')
    record(some / "damaged", "evaluate", {})
    (some / "damaged" / "run.json").write_text("{")
    record(some / "begun", "evaluate", {})
    (some / "begun" / "run.json").unlink()
    (some / "a folder without runs").mkdir()
    page = written(some, tmp_path / "r")
    assert "No frontier is there: lightning run recipes/frontier.yaml" in page
    assert "It cannot be drawn:" in page and "parent_fingerprint" in page
    assert f"{some / 'damaged'}: its records cannot be read" in page
    assert f"{some / 'begun'}: incomplete" in page
    assert "Requests: No frontier is there" in capsys.readouterr().out
    assert json.loads((tmp_path / "r" / "run.json").read_text())["results"]["missing"] == 8.0


def test_stages_of_a_pipeline_are_runs_of_their_own(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "pipeline")
    record(tmp_path / "pipeline", "pipeline", {})
    page = written(tmp_path / "pipeline", tmp_path / "r")
    assert 'class="missing"' not in page and f"<td>{tmp_path / 'pipeline'}</td>" not in page


def test_windows_are_shown_in_the_metric_that_the_search_counted(runs: Path, tmp_path: Path) -> None:
    scored = record(tmp_path / "runs" / "score", "score", {})
    both = {"kl": Measurement(0.5, 0.01), "long_context": Measurement(0.25, 0.01)}
    Scores("f", 10, 100, {(0, "experts=4"): both, (0, "window=16"): both}).save(scored)
    searched = record(tmp_path / "runs" / "search", "search", {})
    config = searched / "config.yaml"
    config.write_text(config.read_text() + "objective: {metric: kl, window_metric: long_context}\n")
    page = written(tmp_path / "runs", tmp_path / "r")
    assert "kl of experts=4, each alone" in page and "long_context of window=16, each alone" in page
    assert page.count("0.5 ± 0.01") == page.count("0.25 ± 0.01") == 1


def test_another_parent_in_the_place_of_the_first_is_said(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "assemble", tmp_path / "runs" / "assemble")
    claimed = tmp_path / "runs" / "assemble" / "inputs.json"
    claimed.write_text(claimed.read_text().replace('"content": {}', '"content": {"config": "another"}'))
    assert "is not the parent that" in written(tmp_path / "runs", tmp_path / "r")


def test_a_damaged_run_leaves_the_others_where_they_are(runs: Path, tmp_path: Path) -> None:
    for name in ("rl_recover", "evaluate"):
        shutil.copytree(runs / name, tmp_path / "runs" / name)
    log = record(tmp_path / "runs" / "damaged", "fit", {"accuracy/low": "high"}) / "logs"
    log.mkdir()
    (log / "metrics.csv").write_text("step,train/loss\n1,abc\n")
    page = written(tmp_path / "runs", tmp_path / "r")
    assert f"{tmp_path / 'runs' / 'damaged'} cannot be drawn" in page and "training_1" not in page
    assert f"{tmp_path / 'runs' / 'damaged'} is left out, its results are damaged" in page
    assert f"Training of {tmp_path / 'runs' / 'rl_recover'}" in page and "0.500 ± 0.100" in page


def test_rows_that_have_changed_since_are_not_shown(runs: Path, tmp_path: Path) -> None:
    for name in ("frontier", "evaluate", "evaluate_parent"):
        shutil.copytree(runs / name, tmp_path / "runs" / name)
    moved = (tmp_path / "runs" / "frontier" / "inputs.json").read_text().replace(str(runs), str(tmp_path / "runs"))
    (tmp_path / "runs" / "frontier" / "inputs.json").write_text(moved)
    assert "The same prompts, by parent and child." in written(tmp_path / "runs", tmp_path / "r")
    rows = tmp_path / "runs" / "evaluate" / EPISODES_FILE
    write_rows(rows, [replace(episode, environment="CHAINS") for episode in read_rows(rows)])
    numbers = tmp_path / "runs" / "frontier" / "frontier.json"
    numbers.write_text(numbers.read_text().replace("request_rate/low/parent", "rate"))
    page = written(tmp_path / "runs", tmp_path / "again")
    assert f"{rows} has changed since" in page and "KeyError: &#39;request_rate/low/parent&#39;" in page


def test_the_newest_of_several_is_shown_and_the_others_named(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    record(tmp_path / "runs" / "again" / "score", "score", {})
    Scores("f", 10, 100, {(0, "experts=4"): {"kl": Measurement(0.75, 0.01)}}).save(
        tmp_path / "runs" / "again" / "score"
    )
    page = written(tmp_path / "runs", tmp_path / "r")
    assert f"shown is the newest, {tmp_path / 'runs' / 'again' / 'score'}" in page and "0.75 ± 0.01" in page


def test_it_is_made_again_with_overwrite_and_leaves_itself_out(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    first = written(tmp_path / "runs", tmp_path / "runs" / "report")
    assert written(tmp_path / "runs", tmp_path / "runs" / "report", "--overwrite") == first


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--folders=[nowhere]"], "nowhere was given in `folders`"),
        ([f"--folders=[{tmp_path}]"], f"No complete run is in {tmp_path}"),
        ([f"--folders=[{tmp_path}]", "--samples=-1"], "samples -1 was given"),
    ):
        with pytest.raises(SystemExit) as refused:
            main(["run", "recipes/report.yaml", f"--run_dir={tmp_path / 'r'}", *words])
        assert refused.value.code == 2 and message in capsys.readouterr().err


def test_it_needs_no_torch() -> None:
    code = "import sys, lit_puzzle.report.report; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield opened
        opened.close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
@pytest.mark.parametrize(("scheme", "ground"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(13, 17, 23)")])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it(made: Path, browser: Browser, width: int, scheme: str, ground: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)  # type: ignore[arg-type]
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.goto((made / "report.html").as_uri())
    assert wrong == [] and page.title() == "Report"
    assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out of the page
    assert page.evaluate("[...document.images].map(one => one.complete && one.naturalWidth > 0)") == [True] * 6
    assert page.evaluate("document.images[0].currentSrc == document.images[0].src") == (scheme == "light")
    texts = "[...document.querySelectorAll('p, a, th, td, pre')].map(one => parseFloat(getComputedStyle(one).fontSize))"
    assert min(page.evaluate(texts)) >= 12
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    page.click("nav a >> text=Sources")
    assert page.evaluate("location.hash") == "#sources"
    context.close()
