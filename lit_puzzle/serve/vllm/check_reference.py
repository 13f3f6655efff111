"""Compute what vLLM is compared with: greedy tokens and log-probabilities of a folder in transformers.

Reads a checkpoint folder. Prompts are random tokens without special ones, which fit every tokenizer and are in no
cache; and, if the folder has a chat template, a question at each reasoning effort.

Memory: the model in the dtype of the check (MXFP4 experts unpacked) + the logits of one sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lit_puzzle.environments.environment import EFFORTS
from lit_puzzle.generation.stop_tokens import end_and_pad
from lit_puzzle.model.chat import fix_date, render_chat
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.loading import DtypeName, load_model
from lit_puzzle.model.opening import load_tokenizer
from lit_puzzle.serve.vllm.settings import CheckPrompts


@dataclass(frozen=True)
class Reference:
    """Completions and log-probabilities of transformers.

    Attributes:
        prompts: random tokens.
        completions: greedy tokens after each prompt; end tokens do not end them.
        logprobs: log-probability of every token of prompt + completion but the first.
        end_ids: tokens that end a completion.
        chats: the rendered question at each reasoning effort; empty without a chat template.
        chat_completions: greedy tokens after each, up to and with an end token.
        plain_id: a token that ends no completion.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    logprobs: list[list[float]]
    end_ids: list[int]
    chats: dict[str, list[int]]
    chat_completions: dict[str, list[int]]
    plain_id: int

    @property
    def sequences(self) -> list[list[int]]:
        """Prompts with their completions."""
        return [prompt + completion for prompt, completion in zip(self.prompts, self.completions, strict=True)]


def make_reference(folder: Path, dtype: DtypeName, prompts: CheckPrompts, seed: int) -> Reference:
    """Load the folder into transformers and generate the reference.

    Args:
        folder: checkpoint folder with a tokenizer.
        dtype: dtype to compute in.
        prompts: prompts that are continued.
        seed: seed of the random prompts.
    """
    tokenizer = load_tokenizer(folder)
    fix_date(tokenizer, date.today().isoformat())  # the server's chat template reads the clock
    model = load_model(folder, "bfloat16" if Checkpoint(folder).mxfp4_layers else dtype).to(getattr(torch, dtype))
    model.eval()
    end_ids, _ = end_and_pad(model, tokenizer)
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids) - set(end_ids))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(ordinary), (prompts.count, prompts.tokens), generator=generator)
    random_prompts = [[ordinary[i] for i in row] for row in drawn.tolist()]
    chats = {}
    if tokenizer.chat_template is not None:
        for effort in EFFORTS:
            messages = [{"role": "user", "content": prompts.question}]
            text = render_chat(tokenizer, messages, reasoning_effort=effort)
            chats[effort] = tokenizer.encode(text, add_special_tokens=False)
    with torch.inference_mode():
        completions = [greedy(model, ids, prompts.new_tokens, []) for ids in random_prompts]
        pairs = zip(random_prompts, completions, strict=True)
        return Reference(
            prompts=random_prompts,
            completions=completions,
            logprobs=[score(model, ids + completion) for ids, completion in pairs],
            end_ids=end_ids,
            chats=chats,
            chat_completions={effort: greedy(model, ids, prompts.new_tokens, end_ids) for effort, ids in chats.items()},
            plain_id=ordinary[0],
        )


def greedy(model: PreTrainedModel, prompt: Sequence[int], tokens: int, end_ids: Sequence[int]) -> list[int]:
    """Return greedy tokens after a prompt, up to and with the first end token, whatever the generation config says."""
    completion: list[int] = []
    cache, ids_1T = None, torch.tensor([prompt], device=model.device)
    while len(completion) < tokens and not (completion and completion[-1] in end_ids):
        output = model(input_ids=ids_1T, past_key_values=cache, use_cache=True)
        cache, ids_1T = output.past_key_values, output.logits[:, -1:].argmax(-1)
        completion.append(int(ids_1T))
    return completion


def score(model: PreTrainedModel, sequence: Sequence[int]) -> list[float]:
    """Return the log-probability of every token given those before it."""
    ids_1T = torch.tensor([sequence], device=model.device)
    logits_TV = model(input_ids=ids_1T).logits[0, :-1].float()
    return torch.log_softmax(logits_TV, -1).gather(-1, ids_1T[0, 1:, None])[:, 0].tolist()
