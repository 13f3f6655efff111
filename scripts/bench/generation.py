"""Bench: the transformers engine against transformers' own `generate`, on the embedded tiny parent.

    python scripts/bench/generation.py [--runs 5] [--prompts 384] [--batch_size 128]

    engine    `TransformersEngine`: rows that end are refilled, nothing is read twice
    batches   `generate` on batches of like effort and length: a batch decodes until its last row ends
    rounds    `generate` in rounds of up to 32, 128, 512, ... tokens: what has not ended is read again in full batches

Workloads: `greedy`, completions of held-out problems, a third at each effort, of up to 96 tokens; `long`, the same
prompts at temperature 2, which derails the model, of up to 1,024 tokens (1 to the cap, about 130 on average);
`endless`, greedy of up to 1,024 tokens, with three prompts of random tokens more, whose completions do not end.
Methods take turns; generated tokens per CPU-second, float32, one thread, medians over runs; ratios are medians of the
runs' ratios. Goal: engine / rounds at least 1 in all. Greedy tokens must agree. Ends with one JSON line.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_puzzle.environments.chat_template import render_prompt
from lit_puzzle.environments.environment import EFFORTS
from lit_puzzle.evaluate.held_out import held_out_problems
from lit_puzzle.generation.padding import pad_left
from lit_puzzle.generation.policy import load_policy
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.generation.stop_tokens import end_and_pad
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.run.folder import PACKAGE
from lit_puzzle.tiny.world import Chains, Counting, Sorting

WORKLOADS = {
    "greedy": Sampling(96, temperature=0.0),
    "long": Sampling(1024, temperature=2.0),
    "endless": Sampling(1024, temperature=0.0),
}
ROUNDS = (32, 128, 512)
Method = Callable[[Sampling], list[list[int]]]


def make_prompts(tokenizer: PreTrainedTokenizerBase, per_effort: int) -> list[list[int]]:
    """Held-out problems, effort after effort, each effort's by length."""
    prompts = []
    for effort in EFFORTS:
        pairs = held_out_problems([Chains(), Sorting(), Counting()], [effort], per_effort, 0)
        texts = [render_prompt(tokenizer, *pair) for pair in pairs]
        prompts += sorted((list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts), key=len)
    return prompts


def endless_prompts(engine: TransformersEngine, count: int) -> list[list[int]]:
    """Prompts of random tokens whose greedy completions do not end within 512 tokens."""
    rows = torch.randint(8, 101, (40, 40), generator=torch.Generator().manual_seed(0)).tolist()
    completions = engine.generate(rows, Sampling(512, temperature=0.0))
    return [row for row, done in zip(rows, completions, strict=True) if done.finish == "length"][:count]


def methods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], batch_size: int
) -> dict[str, Method]:
    """Each method, ready to complete the same prompts."""
    ends, pad_id = end_and_pad(model, tokenizer)

    def one_batch(batch: list[list[int]], sampling: Sampling, tokens: int) -> list[list[int]]:
        drawn = {"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0} if sampling.temperature else {}
        settings = GenerationConfig(
            do_sample=bool(drawn), max_new_tokens=tokens, eos_token_id=ends, pad_token_id=pad_id, **drawn
        )
        ids_BT, mask_BT = pad_left(batch, pad_id)
        rows = model.generate(ids_BT, attention_mask=mask_BT, generation_config=settings)[:, ids_BT.shape[1] :].tolist()
        stops = [next((place for place, token in enumerate(row) if token in ends), len(row)) for row in rows]
        return [row[: stop + 1] for row, stop in zip(rows, stops, strict=True)]

    def rounds(sampling: Sampling, limits: Sequence[int]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in prompts]
        pending, reached = list(range(len(prompts))), 0
        for limit in [*(limit for limit in limits if limit < sampling.max_new_tokens), sampling.max_new_tokens]:
            for start in range(0, len(pending), batch_size):
                rows = pending[start : start + batch_size]
                more = one_batch([prompts[row] + found[row] for row in rows], sampling, limit - reached)
                for row, tokens in zip(rows, more, strict=True):
                    found[row] += tokens
            pending, reached = [row for row in pending if found[row][-1] not in ends], limit
        return found

    engine = TransformersEngine(model, tokenizer, batch_size)
    return {
        "engine": lambda sampling: [done.token_ids for done in engine.generate(prompts, sampling)],
        "batches": lambda sampling: rounds(sampling, ()),
        "rounds": lambda sampling: rounds(sampling, ROUNDS),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=384)
    parser.add_argument("--batch_size", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokenizer = load_policy(PACKAGE / "assets" / "tiny_parent", "float32", "cpu")
    model.eval()
    prompts = make_prompts(tokenizer, arguments.prompts // len(EFFORTS))
    endless = endless_prompts(TransformersEngine(model, tokenizer, arguments.batch_size), 3)
    found: dict[str, dict[str, float]] = {}
    for workload, sampling in WORKLOADS.items():
        given = [*endless, *prompts] if workload == "endless" else prompts
        every = methods(model, tokenizer, given, arguments.batch_size)
        speeds: dict[str, list[float]] = {name: [] for name in every}
        tokens: dict[str, list[list[int]]] = {}
        with torch.inference_mode():
            for _ in range(arguments.runs):
                for name, method in every.items():
                    start = time.process_time()
                    tokens[name] = method(sampling)
                    seconds = time.process_time() - start
                    speeds[name].append(sum(len(row) for row in tokens[name]) / seconds)
        assert sampling.temperature or tokens["engine"] == tokens["batches"] == tokens["rounds"]
        found[workload] = {name: statistics.median(values) for name, values in speeds.items()}
        for name in ("batches", "rounds"):
            ratios = [a / b for a, b in zip(speeds["engine"], speeds[name], strict=True)]
            found[workload][f"engine/{name}"] = statistics.median(ratios)
        print(workload, {name: round(value, 2) for name, value in found[workload].items()}, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
