"""Rollouts of the tiny child by transformers and by vLLM: generated tokens per CPU-second, the same prompts.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python scripts/bench/rollout_speed.py [--completions 64] [--tokens 96] [--rounds 5]

`generate` is what TRL calls with `rollouts.engine: transformers` (its default); `our engine` is what validation runs
there; `vllm` is `rollouts.engine: vllm`, with the log-probabilities of its tokens; `update` sends it the weights of the
attention. CPU seconds are of this process and its engine's, medians over the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor
from transformers import GenerationConfig

from lit_puzzle.environments.chat_template import render_prompt
from lit_puzzle.environments.environment import EFFORTS
from lit_puzzle.evaluate.held_out import held_out_problems
from lit_puzzle.generation.padding import pad_left
from lit_puzzle.generation.policy import load_policy
from lit_puzzle.generation.rollout_engine import RolloutEngine
from lit_puzzle.generation.rollout_settings import RolloutSettings
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.model.tokens import token_ids
from lit_puzzle.tiny.world import Chains, Counting

CHILD = Path("lit_puzzle/assets/tiny_child")
GROUP = 8


@dataclass
class Weight:
    """A tensor that training would change."""

    base: Tensor

    def value(self) -> Tensor:
        """Return it as it is."""
        return self.base.detach()


def cpu_seconds() -> float:
    """Return CPU seconds of this process and of those that it has started."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return float(sum(spent.user + spent.system for spent in times))


def measured(rounds: int, work: Callable[[int], int]) -> tuple[float, float]:
    """Return the medians of CPU seconds and of tokens per CPU-second, after one round that is not counted."""
    seconds, speeds = [], []
    for number in range(rounds + 1):
        begun = cpu_seconds()
        tokens = work(number)
        seconds.append(cpu_seconds() - begun)
        speeds.append(tokens / seconds[-1])
    return statistics.median(seconds[1:]), statistics.median(speeds[1:])


def said(found: tuple[float, float]) -> str:
    """Return the numbers of a way as text."""
    return f"{found[0]:.2f} CPU-seconds, {found[1]:.0f} tokens per CPU-second"


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser()
    for name, value in (("--completions", 64), ("--tokens", 96), ("--rounds", 5)):
        parser.add_argument(name, type=int, default=value)
    given = parser.parse_args()
    model, tokenizer = load_policy(CHILD, "float32")
    pairs = held_out_problems([Chains(), Counting()], list(EFFORTS), -(-given.completions // (GROUP * 3)), 0)
    prompts = [token_ids(tokenizer, render_prompt(tokenizer, *pair)) for pair in pairs for _ in range(GROUP)]
    prompts = prompts[: given.completions]
    engine = TransformersEngine(model, tokenizer, 128)
    config = GenerationConfig(
        max_new_tokens=given.tokens, do_sample=True, eos_token_id=engine.end_ids, pad_token_id=engine.pad_id
    )

    def generate(_: int) -> int:
        ids, mask = pad_left(prompts, engine.pad_id)
        made = model.generate(ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :]
        ended = torch.isin(made, torch.tensor(engine.end_ids)).int()
        return int(((ended.cumsum(1) - ended) == 0).sum())

    def sampling(number: int) -> Sampling:
        return Sampling(given.tokens, seed=number, logprobs=True)

    def ours(number: int) -> int:
        return sum(len(done.token_ids) for done in engine.generate(prompts, sampling(number)))

    print("generate    ", said(measured(given.rounds, generate)))
    print("our engine  ", said(measured(given.rounds, ours)))
    beside = RolloutEngine(RolloutSettings("vllm", kv_cache_gib=0.25, context_tokens=256), CHILD)
    attention = {name: Weight(p) for name, p in model.named_parameters() if "self_attn" in name and p.ndim == 2}

    def vllm(number: int) -> int:
        return sum(len(done.token_ids) for done in beside.generate(prompts, sampling(number)))

    print("vllm        ", said(measured(given.rounds, vllm)))
    begun, clock = cpu_seconds(), time.monotonic()
    sent = beside.update(attention)
    print(f"update       {cpu_seconds() - begun:.2f} s ({time.monotonic() - clock:.2f} s of the clock), {sent:,} bytes")
    beside.close()


if __name__ == "__main__":
    main()
