"""Run the parts of the GPU check, each in a process of its own with its own time limit, and print a table.

Writes report.json again after every part: nothing is lost. Imports no torch: a broken one breaks its parts only.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIMITS = {  # seconds; together 475 without those that must be asked for
    "attention": 80,
    "layer": 45,
    "expert_importance": 25,
    "distill": 35,
    "mxfp4": 25,
    "cost_model": 35,
    "rl": 70,
    "fp8_kv": 60,
    "rollouts": 100,
    "real_size": 400,
    "serving": 440,
}
ASKED_FOR = ("real_size", "serving")
DEFAULT = [name for name in LIMITS if name not in ASKED_FOR]
TOTAL_SECONDS = 480  # of the parts that run by default
MISSING = re.compile(r"ModuleNotFoundError: No module named '((?!lit_puzzle)[^']+)'")  # of what a part imports
SLOWER = 5  # times the limits with --small: a core that is shared, not a card


def run_part(name: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run one part and return its result; it and what it started are killed when its time is over."""
    out, log = options.out / f"{name}.json", options.out / f"{name}.log"
    out.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / f"{name}.py"), "--device", options.device, "--out", str(out)]
    start = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            command + ["--small"] * options.small, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(timeout=seconds)
            result = _read(out, log, process.returncode)
        except subprocess.TimeoutExpired:
            found = json.loads(out.read_text()) if out.is_file() else {}
            result = {**found, "status": "timed out", "reason": f"after {seconds:.0f} s"}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def _read(out: Path, log: Path, code: int) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"status": "unfinished"}
    if result["status"] != "unfinished":
        return result
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    if lines and (missing := MISSING.match(lines[-1])):
        return {**result, "status": "skipped", "reason": f"{missing[1]} is not installed"}
    return {**result, "status": "failed", "reason": f"exit {code}: {lines[-1] if lines else 'no output'}; see {log}"}


def environment(device: str) -> dict[str, Any]:
    """Return date, card and versions."""
    versions: dict[str, str | None] = {}
    for package in ("torch", "transformers", "lightning", "trl", "peft", "kernels", "vllm", "aiconfigurator-core"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    card = None
    if device == "cuda" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        card = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    return {"date": date, "device": device, "card": card, "python": platform.python_version(), "versions": versions}


def table(report: dict[str, Any]) -> str:
    """Return the report as text: one line for each part, and its rows in columns."""
    lines = [f"{report['date']}  {report['card'] or report['device']}  torch {report['versions']['torch']}"]
    for name, part in report["parts"].items():
        lines += ["", f"{name}: {part['status']} ({part['seconds']} s)  {part.get('reason', '')}".rstrip()]
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in part.get("rows", []):
            groups.setdefault(tuple(row), []).append(row)
        for columns, rows in groups.items():
            cells = [columns, *(tuple(_cell(row[column]) for column in columns) for row in rows)]
            widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
            lines += ["  " + "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Run what is asked for; return 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=LIMITS,
        default=DEFAULT,
        metavar="PART",
        help=str([*LIMITS]),
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder of the report")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {**environment(options.device), "small": options.small, "parts": {}}
    slower = SLOWER if options.small else 1
    end = time.monotonic() + slower * max(TOTAL_SECONDS, sum(LIMITS[name] for name in options.parts))
    for name in options.parts:
        seconds = min(slower * LIMITS[name], end - time.monotonic())
        if seconds < 5:
            report["parts"][name] = {"status": "skipped", "reason": "no time left", "seconds": 0.0}
        else:
            print(f"{name} (at most {seconds:.0f} s) ...", flush=True)
            report["parts"][name] = run_part(name, options, seconds)
        (options.out / "report.json").write_text(json.dumps(report, indent=1))
    print(f"\n{table(report)}\n\n{options.out / 'report.json'}")
    return int(any(part["status"] not in ("ok", "skipped") for part in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
