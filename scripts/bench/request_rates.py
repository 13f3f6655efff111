"""Bench: requests a second of several models in real vLLM, each with the tokens that its own evaluation measured.

    python scripts/bench/request_rates.py --model parent=CHECKPOINT:EVALUATION --model child=CHECKPOINT:EVALUATION ...

CHECKPOINT is a folder, EVALUATION a run of `recipes/evaluate.yaml` of it: per effort, a request has the mean prompt
tokens and the mean generated tokens (rounded) of its rows. All engines (float32, one thread, one core) run at a time
and take turns on each workload; the first round warms up. Prompts are random and differ between rounds, so no prefix
is cached. Printed per effort: requests a CPU second at the best batch, and the ratio to the first model with the range
of the rounds. Nothing is derived from another length: where reading prompts takes most of the time, throughput in
generated tokens divided by generated tokens would credit short answers with prompts that nobody saved.

    python scripts/bench/request_rates.py --prompt 96 --generated 48 --model ...    one workload for all, no evaluations

Needs `bash scripts/vllm_env.sh`. Ends with one JSON line.
"""

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from lit_puzzle.environments.episodes import EPISODES_FILE, read_rows
from lit_puzzle.run.folder import require_input
from lit_puzzle.serve.vllm.check import require_vllm
from lit_puzzle.serve.vllm.measured import ONE_THREAD
from lit_puzzle.serve.vllm.turns import TurnsEngine

Workload = tuple[int, int]  # prompt and generated tokens of a request
CACHE_BYTES = 2**29


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--model", action="append", required=True, help="NAME=CHECKPOINT[:EVALUATION]; the parent first"
    )
    parser.add_argument("--prompt", type=int)
    parser.add_argument("--generated", type=int)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--python", type=Path, default=Path(".venv-vllm/bin/python"))
    arguments = parser.parse_args()
    models = {name: folders.split(":") for name, _, folders in (word.partition("=") for word in arguments.model)}
    if arguments.prompt and arguments.generated:
        work = {name: {"all": (arguments.prompt, arguments.generated)} for name in models}
    else:
        work = {name: measured(Path(folders[1])) for name, folders in models.items()}
    longest = max(sum(workload) for efforts in work.values() for workload in efforts.values())
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": longest + 1}
    settings |= {"kv_cache_memory_bytes": CACHE_BYTES, "max_num_seqs": max(arguments.batches)}
    settings |= {"enable_prefix_caching": False}
    python = require_vllm(arguments.python)
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines = {}
        for name, folders in models.items():
            folder = require_input(Path(folders[0]), name, "config.json").resolve()
            engine = TurnsEngine(python, folder, settings | {"skip_tokenizer_init": True}, logs / name, ONE_THREAD)
            engines[name] = stack.enter_context(engine)
            engine.wait_until_ready()
        found = {
            effort: rates(engines, {name: work[name][effort] for name in models}, arguments)
            for effort in next(iter(work.values()))
        }
    for effort, rows in found.items():
        for name, row in rows.items():
            low, high = row["lowest"], row["highest"]
            print(
                f"{effort:6s} {name:10s} {work[name][effort][0]} + {work[name][effort][1]} tokens: "
                f"{row['requests_per_second']:.1f} requests/s, {row['ratio']:.3f} ({low:.3f} to {high:.3f}), "
                f"batch {row['batch']}"
            )
    print(json.dumps({"name": "request_rates", "found": found}))


def measured(evaluation: Path) -> dict[str, Workload]:
    """Return the mean prompt and generated tokens of an evaluation, by effort."""
    rows = read_rows(require_input(evaluation, "evaluation", EPISODES_FILE) / EPISODES_FILE)
    found = {}
    for effort in dict.fromkeys(row.effort for row in rows):
        own = [row for row in rows if row.effort == effort]
        prompts = [row.request.prompt_tokens for row in own if row.request.prompt_tokens is not None]
        found[effort] = (round(statistics.mean(prompts)), round(statistics.mean(row.generated_tokens for row in own)))
    return found


def rates(
    engines: dict[str, TurnsEngine], work: dict[str, Workload], arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Return the request rate of each engine at its best batch, and its ratio to the first one's."""
    seconds: dict[str, dict[int, list[float]]] = {name: {} for name in engines}
    for batch in arguments.batches:
        for turn in range(arguments.rounds + 1):
            for name, engine in list(engines.items())[:: 1 if turn % 2 else -1]:
                prompt, generated = work[name]
                step = {"do": "timed", "requests": batch, "prompt": prompt, "generated": generated, "seed": turn}
                seconds[name].setdefault(batch, []).append(engine.step(step)["cpu"])
    found: dict[str, dict[str, float]] = {}
    best = {
        name: min(taken, key=lambda batch: statistics.median(taken[batch][1:]) / batch)
        for name, taken in seconds.items()
    }
    parent = next(iter(engines))
    for name, taken in seconds.items():
        own = [seconds_ / best[name] for seconds_ in taken[best[name]][1:]]  # of one request
        theirs = [seconds_ / best[parent] for seconds_ in seconds[parent][best[parent]][1:]]
        ratios = [old / new for old, new in zip(theirs, own, strict=True)]
        found[name] = {
            "requests_per_second": 1 / statistics.median(own),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "batch": best[name],
        }
    return found


if __name__ == "__main__":
    main()
