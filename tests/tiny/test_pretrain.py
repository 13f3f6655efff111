"""Training the tiny parent: lessons, initialization, exact resuming, the written folder, and the shipped parent."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from lightning import Trainer, seed_everything
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lit_puzzle
from lit_puzzle.environments.chat_template import render_prompt
from lit_puzzle.environments.environment import EFFORTS, Problem, is_held_out
from lit_puzzle.environments.harmony import parse_text
from lit_puzzle.evaluate.held_out import held_out_problems
from lit_puzzle.evaluate.solving import solve_problems
from lit_puzzle.evaluate.summary import summarize
from lit_puzzle.generation.lengths import read_lengths
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.tiny.lessons import IGNORED, Lessons, practice, retrieval, supervised
from lit_puzzle.tiny.parent import build_parent
from lit_puzzle.tiny.pretrain import FlatThenCosine, LessonData, TinyParent, next_token_loss
from lit_puzzle.tiny.settings import AttentionShape, Curriculum, Initialization, ParentShape
from lit_puzzle.tiny.tokenizer import build_tokenizer
from lit_puzzle.tiny.world import Chains, Counting, Family, Sorting

TOKENIZER = build_tokenizer()
FAMILIES: tuple[Family, ...] = (Chains(), Sorting(), Counting())
SMALL = ParentShape(
    num_hidden_layers=2,
    hidden_size=32,
    intermediate_size=16,
    num_local_experts=4,
    attention=AttentionShape(num_attention_heads=4, head_dim=16),
)
CURRICULUM = Curriculum(retrieval_steps=2, practice_steps=2, sequences=3, sequence_tokens=128)
SHIPPED = Path(lit_puzzle.__file__).parent / "assets" / "tiny_parent"


def words(ids: list[int]) -> list[str]:
    return [str(TOKENIZER.decode([token])) for token in ids]


def labeled(ids: list[int], labels: list[int]) -> str:
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    return "".join(words([label for label in labels if label != IGNORED]))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("entries", [3, 16])
def test_retrieval_labels_follow_from_the_table(family: Family, entries: int) -> None:
    ids, labels = retrieval(TOKENIZER, family, random.Random(0), entries)
    definitions: list[list[str]] = []
    for word in words(ids)[1:]:
        definitions.append([word]) if word.endswith("=") else definitions[-1].append(word)
    shown, copied = definitions[:entries], definitions[entries:]
    assert len({definition[0] for definition in shown}) == entries
    assert len(copied) >= entries and all(definition in shown for definition in copied)
    assert labeled(ids, labels) == "".join("".join(definition[1:]) for definition in copied)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize(("longest", "context"), [(192, None), (600, 400)])
def test_conversations_are_prompt_and_trace_and_never_held_out(
    family: Family, longest: int, context: int | None
) -> None:
    for seed in range(12):
        ids, labels = supervised(TOKENIZER, family, random.Random(seed), longest, {"high": 1.0}, 12, context)
        conversations = "".join(words(ids)).split("<|return|>")[:-1]
        table = conversations[0].split("<|message|>")[2].split("\n")[0]
        traces = ""
        for conversation in conversations:
            question = conversation.split("<|message|>")[2].split("\n")[1].split("<|end|>")[0]
            answer = conversation.split("<|message|>")[-1]
            problem = Problem(family.name, ({"role": "user", "content": f"{table}\n{question}"},), answer)
            if not traces or not context:  # a later question was never asked about the lengthened table
                assert not is_held_out(problem)
            assert parse_text(family.trace(problem, "high")).final == answer
            traces += family.trace(problem, "high")
        assert labeled(ids, labels) == traces
        assert "".join(words(ids)).startswith(render_prompt(TOKENIZER, problem, "high")[:40])
        assert len(ids) <= longest and len(conversations) > 1
        if context:
            prompt = next(place for place, label in enumerate(labels) if label != IGNORED)
            assert context - 1 <= prompt <= context


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_practice_labels_are_high_effort_analyses(family: Family) -> None:
    ids, labels = practice(TOKENIZER, family, random.Random(1), 192)
    table, *chunks = "".join(words(ids)).split("\n")
    assert len(ids) <= 192 and len(chunks) > 2
    for chunk in chunks:
        question, analysis = chunk.split("?")
        problem = Problem(family.name, ({"role": "user", "content": f"{table}\n{question}?"},), "")
        assert analysis == family.analysis(problem, "high")
    assert labeled(ids, labels) == "".join(chunk.split("?")[1] for chunk in chunks)


def test_a_batch_depends_on_seed_and_step_only() -> None:
    def batches(seed: int, first: int) -> list[dict[str, Tensor]]:
        return list(Lessons(CURRICULUM, FAMILIES, TOKENIZER, seed, first, 6))

    whole, tail, other = batches(0, 0), batches(0, 3), batches(1, 0)
    assert len(whole) == 6 and len(tail) == 3
    for one, same, different in zip(whole[3:], tail, other[3:], strict=True):
        assert torch.equal(one["input_ids"], same["input_ids"]) and torch.equal(one["labels"], same["labels"])
        assert not torch.equal(one["input_ids"][:, :8], different["input_ids"][:, :8])
    assert not (whole[0]["labels"] == TOKENIZER.pad_token_id).any()


def test_tables_grow_over_the_first_phase() -> None:
    entries = [Curriculum(retrieval_steps=100).entries(step) for step in range(100)]
    assert entries[0] == 3 and entries == sorted(entries) and entries.index(16) in range(75, 91)
    with pytest.raises(ValueError, match="sequence_tokens"):
        Curriculum(sequence_tokens=10)


def test_windowed_heads_attend_the_initial_distances() -> None:
    torch.manual_seed(0)
    shape = ParentShape(num_hidden_layers=2)
    model = build_parent(shape, Initialization(looks_back=(1, 2, 3, 4)))
    tokens = torch.randint(8, 100, (1, 24))
    seen_HTT = model(input_ids=tokens, output_attentions=True).attentions[0][0]
    for head in range(4):
        assert (seen_HTT[head, 8:].argmax(-1) == torch.arange(8, 24) - (head + 1)).float().mean() > 0.8
    plain = build_parent(shape, Initialization(positional_bias=0.0))
    flat_HTT = plain(input_ids=tokens, output_attentions=True).attentions[0][0]
    assert flat_HTT[:, 8:].max() < seen_HTT[:, 8:].max(-1).values.mean()


def test_initialization_scales_and_letter_share() -> None:
    torch.manual_seed(0)
    model = build_parent(ParentShape(num_hidden_layers=2), Initialization(embedding_std=1.0, letter_share=0.8))
    embedding, vocabulary = model.model.embed_tokens.weight, TOKENIZER.get_vocab()
    assert embedding.std().item() == pytest.approx(1.0, abs=0.05)
    assert model.model.layers[0].self_attn.q_proj.weight.std().item() == pytest.approx(0.05, abs=0.005)
    pairs = [(vocabulary[letter], vocabulary[f" {letter}="]) for letter in "abcdefghijklmnopqrst"]
    shared = torch.stack([torch.cosine_similarity(embedding[a], embedding[b], dim=0) for a, b in pairs])
    assert shared.mean().item() == pytest.approx(0.8, abs=0.03)
    with pytest.raises(ValueError, match="vocab_size 64"):
        build_parent(ParentShape(vocab_size=64), Initialization())


def test_loss_by_hand() -> None:
    logits_BTV = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    labels_BT = torch.tensor([[3, IGNORED, 1, 2], [IGNORED, 4, IGNORED, IGNORED]])
    terms = torch.stack([logits_BTV[b, t - 1].log_softmax(-1)[labels_BT[b, t]] for b, t in ((0, 2), (0, 3), (1, 1))])
    assert next_token_loss(logits_BTV, labels_BT).item() == pytest.approx(-terms.mean().item(), rel=1e-6)


def test_schedule_warms_up_stays_and_decays() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = FlatThenCosine(optimizer, total_steps=100, warmup_steps=10, flat_share=0.4)
    rates = []
    for _ in range(111):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.2) and rates[10:41] == pytest.approx([2.0] * 31)
    assert rates[70] == pytest.approx(2.0 * (0.05 + 0.95 * (1 + math.cos(math.pi / 2)) / 2))
    assert rates[100:] == pytest.approx([0.1] * 11)


def train(folder: Path, steps: int, resume: Path | None = None) -> TinyParent:
    seed_everything(3, verbose=False)
    module = TinyParent(
        SMALL,
        Initialization(),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1),
        lr_scheduler=lambda optimizer: FlatThenCosine(optimizer, total_steps=6, warmup_steps=2),
        sampling=Sampling(4, temperature=0.0),
        measured_per_effort=3,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=3,
        check_val_every_n_epoch=None,
    )
    trainer.fit(module, datamodule=LessonData(list(FAMILIES), CURRICULUM, held_out_per_effort=3), ckpt_path=resume)
    trainer.save_checkpoint(folder / "step.ckpt")
    return module


def test_resumed_training_equals_uninterrupted_training_and_the_folder_loads(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 6)
    train(tmp_path / "half", 3)
    resumed = train(tmp_path / "resumed", 6, tmp_path / "half" / "step.ckpt")
    for (name, one), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert resumed.results == whole.results and {"accuracy/high", "tokens/low"} <= set(whole.results)
    folder = tmp_path / "whole" / "model"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16 and type(loaded).__name__ == "GptOssForCausalLM"
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16()), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["eos_token_id"] == tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>"])
    assert settings["pad_token_id"] == tokenizer.pad_token_id not in settings["eos_token_id"]
    assert read_lengths(folder)["high"].mean == whole.results["tokens/high"]


def test_vectors_do_not_decay() -> None:
    module = TinyParent(SMALL, Initialization(), optimizer=lambda groups: torch.optim.AdamW(groups, weight_decay=0.1))
    module.configure_model()
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)
    decays = {p.ndim >= 2: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {True: 0.1, False: 0.0}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.parameters()))


def test_the_shipped_parent_reasons_better_and_longer_at_higher_effort() -> None:
    parent = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    assert sum(parameter.numel() for parameter in parent.parameters()) == 2_049_432
    problems = held_out_problems(FAMILIES, EFFORTS, 36, seed=0)
    engine = TransformersEngine(parent, tokenizer, 108)
    numbers = summarize(solve_problems(engine, tokenizer, problems, FAMILIES, Sampling(64, 0.0)))
    accuracies = [numbers[f"accuracy/{effort}"] for effort in EFFORTS]
    lengths = [numbers[f"tokens/{effort}"] for effort in EFFORTS]
    assert accuracies[0] < accuracies[1] < accuracies[2] and accuracies[2] > 0.8
    assert 1.5 * lengths[0] < lengths[1] and 1.2 * lengths[1] < lengths[2]
    for effort, mean in zip(EFFORTS, lengths, strict=True):
        assert mean == pytest.approx(read_lengths(SHIPPED)[effort].mean, rel=0.25)
