"""Compute what vLLM is compared with: greedy tokens and log-probabilities of a folder in transformers.

Reads a checkpoint folder. Prompts are random tokens without special ones, which fit every tokenizer and are in no
cache; and, if the folder has a chat template, a question at each reasoning effort, or without one (`none`) where the
template has no levels of effort.

How far rounding alone moves the log-probabilities of transformers is what an engine is judged by. In bfloat16 the same
sequences are also scored in float32. In float32 they are scored again on ways that are equal but for rounding: with the
experts of every layer in reverse order, their router rows too, so that a token's experts are added in another order;
with `sink_attention` in place of eager attention; and all sequences together in one batch. And they are scored with
the experts of one layer permuted without their router, which shows whether that negative control can show at all (not
where all experts are chosen alike).

Memory: the model in the dtype of the check (MXFP4 experts unpacked), then in float32 if rounding is measured, + the
logits of all sequences + the experts of one layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lit_puzzle.environments.chat_template import has_efforts
from lit_puzzle.environments.environment import EFFORTS, NO_EFFORT
from lit_puzzle.generation.stop_tokens import end_and_pad
from lit_puzzle.model.chat import fix_date, render_chat
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.loading import DtypeName, load_model
from lit_puzzle.model.modules import decoder_layer, model_family
from lit_puzzle.model.opening import load_tokenizer
from lit_puzzle.serve.vllm.report import difference
from lit_puzzle.serve.vllm.settings import CheckPrompts


@dataclass(frozen=True)
class Reference:
    """Completions and log-probabilities of transformers.

    Attributes:
        prompts: random tokens.
        completions: greedy tokens after each prompt; end tokens do not end them.
        logprobs: log-probability of every token of prompt + completion but the first, in the dtype of the check.
        exact_logprobs: the same in float32; None where the check is in float32, or rounding was not measured.
        rounding: largest change of `logprobs` on the equal ways of float32; None in bfloat16, or where not measured.
        permuted_change: largest and mean change of log-probabilities with the experts of one layer permuted.
        end_ids: tokens that end a completion.
        chats: the rendered question at each reasoning effort; empty without a chat template.
        chat_completions: greedy tokens after each, up to and with an end token.
        plain_id: a token that ends no completion.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    logprobs: list[list[float]]
    exact_logprobs: list[list[float]] | None
    rounding: float | None
    permuted_change: tuple[float, float]
    end_ids: list[int]
    chats: dict[str, list[int]]
    chat_completions: dict[str, list[int]]
    plain_id: int

    @property
    def sequences(self) -> list[list[int]]:
        """Prompts with their completions."""
        return [prompt + completion for prompt, completion in zip(self.prompts, self.completions, strict=True)]


def make_reference(
    folder: Path, dtype: DtypeName, prompts: CheckPrompts, seed: int, measure_rounding: bool = False
) -> Reference:
    """Load the folder into transformers and generate the reference.

    Args:
        folder: checkpoint folder with a tokenizer.
        dtype: dtype to compute in.
        prompts: prompts that are continued.
        seed: seed of the random prompts.
        measure_rounding: whether the sequences are also scored in float32, or in float32 on the ways that are equal.
    """
    tokenizer = load_tokenizer(folder)
    fix_date(tokenizer, date.today().isoformat())  # the server's chat template reads the clock
    model = _load(folder, dtype)
    end_ids, _ = end_and_pad(model, tokenizer)
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids) - set(end_ids))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(ordinary), (prompts.count, prompts.tokens), generator=generator)
    random_prompts = [[ordinary[i] for i in row] for row in drawn.tolist()]
    chats = {}
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": prompts.question}]
        for effort in EFFORTS if has_efforts(tokenizer) else (NO_EFFORT,):
            text = render_chat(tokenizer, messages, **({} if effort == NO_EFFORT else {"reasoning_effort": effort}))
            chats[effort] = tokenizer.encode(text, add_special_tokens=False)
    with torch.inference_mode():
        completions = [greedy(model, ids, prompts.new_tokens, []) for ids in random_prompts]
        sequences = [ids + completion for ids, completion in zip(random_prompts, completions, strict=True)]
        logprobs = last = score_all(model, sequences)
        chat_completions = {effort: greedy(model, ids, prompts.new_tokens, end_ids) for effort, ids in chats.items()}
        rounding = None
        if measure_rounding and dtype == "float32":
            rounding = rounding_of(model, sequences, logprobs)
        elif measure_rounding:
            del model
            model = _load(folder, "float32")
            last = score_all(model, sequences)
        permute_experts(model, permuted_layer(Checkpoint(folder)))
        permuted_change = difference(score_all(model, sequences), last)
    return Reference(
        prompts=random_prompts,
        completions=completions,
        logprobs=logprobs,
        exact_logprobs=None if last is logprobs else last,
        rounding=rounding,
        permuted_change=permuted_change,
        end_ids=end_ids,
        chats=chats,
        chat_completions=chat_completions,
        plain_id=ordinary[0],
    )


def _load(folder: Path, dtype: DtypeName) -> PreTrainedModel:
    stored = "bfloat16" if Checkpoint(folder).mxfp4_layers else dtype
    return load_model(folder, stored).to(getattr(torch, dtype)).eval()


def permuted_layer(checkpoint: Checkpoint) -> int:
    """Return the layer with most experts, whose permutation most likely changes the output."""
    counts = [experts for experts, _ in checkpoint.blocks]
    return counts.index(max(counts))


def rounding_of(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]
) -> float:
    """Return the largest change of log-probabilities on ways of computing them that are equal but for rounding.

    Args:
        model: in float32; it is left as it was.
        sequences: token ids, all of one length.
        logprobs: those of the model as it is.
    """
    way = str(model.config._attn_implementation)
    changes = [difference(score_batch(model, sequences), logprobs)[0]]
    reverse_experts(model)
    changes.append(difference(score_all(model, sequences), logprobs)[0])
    reverse_experts(model)
    model.set_attn_implementation("sink_attention" if way == "eager" else "eager")
    changes.append(difference(score_all(model, sequences), logprobs)[0])
    model.set_attn_implementation(way)
    return max(changes)


def reverse_experts(model: PreTrainedModel) -> None:
    """Put the experts of every layer and their rows of the router into reverse order, in place."""
    names = model_family(model).layer
    for layer in range(model.config.num_hidden_layers):
        for name in (names.experts, names.router):
            for parameter in decoder_layer(model, layer).get_submodule(name).parameters():
                parameter.data = parameter.data.flip(0)


def permute_experts(model: PreTrainedModel, layer: int) -> None:
    """Rotate the experts of a layer by one without its router, in place, as `lit_puzzle.serve.vllm.driver.changed`."""
    experts = decoder_layer(model, layer).get_submodule(model_family(model).layer.experts)
    for parameter in experts.parameters():
        parameter.data = parameter.data.roll(1, dims=0)


def score_all(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return the log-probabilities of all sequences, one after the other."""
    return [score(model, sequence) for sequence in sequences]


def greedy(model: PreTrainedModel, prompt: Sequence[int], tokens: int, end_ids: Sequence[int]) -> list[int]:
    """Return greedy tokens after a prompt, up to and with the first end token, whatever the generation config says."""
    completion: list[int] = []
    cache, ids_1T = None, torch.tensor([prompt], device=model.device)
    while len(completion) < tokens and not (completion and completion[-1] in end_ids):
        output = model(input_ids=ids_1T, past_key_values=cache, use_cache=True)
        cache, ids_1T = output.past_key_values, output.logits[:, -1:].argmax(-1)
        completion.append(int(ids_1T))
    return completion


def score_batch(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return the log-probabilities of sequences of one length, all in one batch."""
    ids_BT = torch.tensor(sequences, device=model.device)
    logits_BTV = model(input_ids=ids_BT).logits[:, :-1].float()
    return torch.log_softmax(logits_BTV, -1).gather(-1, ids_BT[:, 1:, None])[..., 0].tolist()


def score(model: PreTrainedModel, sequence: Sequence[int]) -> list[float]:
    """Return the log-probability of every token given those before it."""
    ids_1T = torch.tensor([sequence], device=model.device)
    logits_TV = model(input_ids=ids_1T).logits[0, :-1].float()
    return torch.log_softmax(logits_TV, -1).gather(-1, ids_1T[0, 1:, None])[:, 0].tolist()
