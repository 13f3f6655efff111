"""scripts/bench/published_throughputs.py: the figures that it carries, and rows that it refuses."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "published_throughputs.py"
HEADER = "gpu_model,input_seq_len,output_seq_len,tensor_parallel,concurrency,output_throughput_per_gpu"


@pytest.fixture(scope="module")
def throughputs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("published_throughputs", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_second_carried_figure_is_within_a_fifth_and_all_within_a_tenth_on_average(
    throughputs: ModuleType,
) -> None:
    runs = throughputs.carried()[::2]
    ratios = [throughputs.predict(run)["throughput"] / run.throughput for run in runs]
    assert len(runs) == 12 and all(0.8 < ratio < 1.2 for ratio in ratios)
    assert throughputs.summary(ratios)["mean_absolute_error"] < 0.1


def test_times_of_the_other_half_are_within_a_tenth_on_average(throughputs: ModuleType) -> None:
    runs = throughputs.carried()[1::2]
    found = [throughputs.predict(run) for run in runs]
    for name in ("step", "first_token"):
        ratios = [guess[name] / getattr(run, name) for guess, run in zip(found, runs, strict=True)]
        assert throughputs.summary(ratios)["mean_absolute_error"] < 0.1
    idle = [throughputs.predict(run, throughputs.FrontEnd(0.0, 0.0))["first_token"] for run in runs]
    assert all(least < guess["first_token"] for least, guess in zip(idle, found, strict=True))


def test_what_does_not_fit_the_memory_waits(throughputs: ModuleType, tmp_path: Path) -> None:
    rows = [f"h100,8192,8192,1,{concurrency},100" for concurrency in (64, 640)]
    (tmp_path / "rows.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    few, many = throughputs.read_rows(tmp_path / "rows.csv")
    assert throughputs.predict(few)["throughput"] == throughputs.predict(many)["throughput"]


def test_a_byte_order_mark_is_no_part_of_a_column(throughputs: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(HEADER + "\nh100,1024,1024,2,4,370\n", encoding="utf-8-sig")
    assert [run.gpu for run in throughputs.read_rows(tmp_path / "rows.csv")] == ["H100"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER.replace(",concurrency", "") + "\nh100,1,1,1,1\n", "row 1: no column 'concurrency'; it has"),
        (
            HEADER + "\nh100,1,1,1,1,2\nmi300x,1,1,1,1,2\n",
            "row 3, column 'gpu_model': 'mi300x' has no measured kernels",
        ),
        (HEADER + "\nh100,1024,1024,2,x,370\n", "row 2, column 'concurrency': 'x' is not a whole number"),
        (HEADER + "\nh100,1024,1024,2,4,nan\n", "row 2, column 'output_throughput_per_gpu': 'nan' is not a positive"),
        (
            HEADER + "\nh100,1e300,1024,2,4,370\n",
            "row 2, column 'input_seq_len': '1e300' is not a whole number from 1 to",
        ),
        (HEADER + "\n" + "h" * 140_000 + "\n", "is no CSV file in UTF-8: field larger"),
        (HEADER + "\n", "has no row beside its header"),
    ],
)
def test_bad_rows_are_named(throughputs: ModuleType, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        throughputs.read_rows(file)
    assert str(file) in str(caught.value)
