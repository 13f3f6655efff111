"""What transformers answers, for a serving check to compare with: greedy tokens and log-probabilities of a folder.

Reads a checkpoint folder. Prompts are random tokens (no special ones), so that they fit any tokenizer and differ from
anything a cache could know; and, where the folder has a chat template, one question at each reasoning effort.

Memory: the model in the dtype of the check (MXFP4 experts unpacked) + the logits of one document.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

from lit_puzzle.generation.stop_tokens import end_and_pad
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.loading import DtypeName, load_model

EFFORTS = ("low", "medium", "high")


@dataclass(frozen=True)
class Reference:
    """What transformers says.

    Attributes:
        prompts: Random tokens.
        answers: Greedy tokens after each, end tokens ignored.
        scores: Log-probability of every token of prompt + answer but the first.
        end_ids: Tokens that end an answer.
        chats: For each reasoning effort the rendered question; empty without a chat template.
        chat_answers: Greedy tokens after each, end token included.
        plain_id: A token that ends nothing.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    scores: list[list[float]]
    end_ids: list[int]
    chats: dict[str, list[int]]
    chat_answers: dict[str, list[int]]
    plain_id: int

    @property
    def documents(self) -> list[list[int]]:
        """Prompts with their answers."""
        return [prompt + answer for prompt, answer in zip(self.prompts, self.answers, strict=True)]


def make_reference(
    folder: Path, dtype: DtypeName, prompts: int, prompt_tokens: int, new_tokens: int, question: str, seed: int
) -> Reference:
    """Loads the folder into transformers and lets it answer.

    Args:
        folder: Checkpoint folder with a tokenizer.
        dtype: To compute in.
        prompts: How many random prompts.
        prompt_tokens: Their length; windows beyond it are not exercised.
        new_tokens: Greedy tokens after each.
        question: What the chats ask.
        seed: Of the prompts.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_model(folder, "bfloat16" if Checkpoint(folder).mxfp4_layers else dtype).to(getattr(torch, dtype))
    model.eval()
    end_ids, _ = end_and_pad(model, tokenizer)
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids) - set(end_ids))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(ordinary), (prompts, prompt_tokens), generator=generator)
    pairs = [[ordinary[i] for i in row] for row in drawn.tolist()]
    chats = {}
    if tokenizer.chat_template is not None:
        for effort in EFFORTS:
            messages = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, reasoning_effort=effort
            )
            chats[effort] = tokenizer.encode(text, add_special_tokens=False)
    with torch.inference_mode():
        answers = [greedy(model, ids, new_tokens, []) for ids in pairs]
        return Reference(
            prompts=pairs,
            answers=answers,
            scores=[score(model, ids + answer) for ids, answer in zip(pairs, answers, strict=True)],
            end_ids=end_ids,
            chats=chats,
            chat_answers={effort: greedy(model, ids, new_tokens, end_ids) for effort, ids in chats.items()},
            plain_id=ordinary[0],
        )


def greedy(model: PreTrainedModel, prompt: Sequence[int], tokens: int, end_ids: Sequence[int]) -> list[int]:
    """Greedy tokens after a prompt, up to the first end token, which stays; no setting of `generate` interferes."""
    answer: list[int] = []
    cache, ids_1T = None, torch.tensor([prompt], device=model.device)
    while len(answer) < tokens and not (answer and answer[-1] in end_ids):
        output = model(input_ids=ids_1T, past_key_values=cache, use_cache=True)
        cache, ids_1T = output.past_key_values, output.logits[:, -1:].argmax(-1)
        answer.append(int(ids_1T))
    return answer


def score(model: PreTrainedModel, document: Sequence[int]) -> list[float]:
    """Log-probability of every token after those before it."""
    ids_1T = torch.tensor([document], device=model.device)
    logits_TV = model(input_ids=ids_1T).logits[0, :-1].float()
    return torch.log_softmax(logits_TV, -1).gather(-1, ids_1T[0, 1:, None])[:, 0].tolist()
