"""In vLLM's environment: a rollout engine with new weights, and what transformers computes with the same ones.

    python vllm_rollouts.py CHILD RESULTS [ENGINE, default: vllm]

Everything is float32, at temperature 0.7. The results are, for the folder's own weights, for changed ones (attention,
then also the router) and for the folder read again: tokens and log-probabilities of both engines, and bytes sent.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lit_puzzle.generation.policy import load_policy
from lit_puzzle.generation.rollout_engine import RolloutEngine
from lit_puzzle.generation.rollout_settings import RolloutSettings
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.generation.transformers_engine import TransformersEngine

TEMPERATURE = 0.7
SAMPLING = Sampling(24, temperature=TEMPERATURE, seed=3, logprobs=True)
PROMPTS = [[1, 8, 3, 13, 14 + n % 7, 20 + n % 5] for n in range(40)]


@dataclass
class Changed:
    """A tensor of the model as a training would give it."""

    base: Tensor

    def value(self) -> Tensor:
        return self.base.detach()


def scored(model: Any, prompt: list[int], tokens: list[int]) -> list[float]:
    """Log-probabilities of tokens after a prompt, at the temperature."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1)[range(len(tokens)), tokens].tolist()


def main(child: str, results: str, engine_name: Literal["vllm", "server"] = "vllm") -> None:
    model, tokenizer = load_policy(Path(child), "float32")
    reference = TransformersEngine(model, tokenizer, 64)
    settings = RolloutSettings(engine_name, kv_cache_gib=0.1, context_tokens=128)
    engine = RolloutEngine(settings, Path(child), "float32", TEMPERATURE)
    found = []

    def compare(sent: int) -> None:
        pairs = list(zip(PROMPTS, engine.generate(PROMPTS, SAMPLING), strict=True))
        expected = [done.token_ids for done in reference.generate(PROMPTS, SAMPLING)]
        errors = [
            abs(a - b)
            for prompt, done in pairs
            for a, b in zip(done.logprobs or [], scored(model, prompt, done.token_ids), strict=True)
        ]
        tokens = [done.token_ids for _, done in pairs]
        found.append({"sent": sent, "tokens": tokens, "expected": expected, "largest_error": max(errors)})

    compare(0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(0)
    for kind in ("self_attn", "router"):
        names = [name for name in before if kind in name or "self_attn" in name]
        with torch.no_grad():
            for name in names:
                if kind in name:
                    model.get_parameter(name).add_(0.05 * torch.randn_like(before[name]))
        engine._weights = None  # a training always sends the same tensors; here there are more the second time
        compare(engine.update({name: Changed(model.get_parameter(name)) for name in names}))
    engine.read_folder(Path(child))
    with torch.no_grad():
        for name, tensor in before.items():
            model.get_parameter(name).copy_(tensor)
    compare(0)
    engine.close()
    Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
