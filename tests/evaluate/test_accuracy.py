"""accuracy.py: greedy completions against single forward passes, statistics by hand, processes, the stage."""

import json
import math
import os
import random
import signal
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import multiprocessing
from transformers import GptOssForCausalLM, PreTrainedTokenizerFast

from lit_puzzle.environments.answer_formats import fix_format
from lit_puzzle.environments.environment import Problem, is_held_out
from lit_puzzle.environments.episodes import Episode, Verdict
from lit_puzzle.evaluate.accuracy import evaluate, read_episodes
from lit_puzzle.evaluate.held_out import HeldOut, held_out_problems
from lit_puzzle.evaluate.solving import gather_episodes, local_rows, solve_problems
from lit_puzzle.evaluate.standard_errors import mean_and_error
from lit_puzzle.evaluate.summary import by_environment, compare, summarize
from lit_puzzle.generation.lengths import LengthStatistics, length_statistics, read_lengths
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.generation.transformers_engine import TransformersEngine

TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    "{% if reasoning_effort == 'high' %}w5 w6{% else %}w7{% endif %}"
)


class Parity:
    """Random questions of 3 to 12 words; right means that the text of the answer has an even number of characters."""

    def __init__(self, name: str = "parity") -> None:
        self.name = name

    def problem(self, rng: random.Random) -> Problem:
        words = " ".join(f"w{rng.randrange(3, 128)}" for _ in range(rng.randrange(3, 13)))
        return Problem(self.name, ({"role": "user", "content": words},), "even")

    def verify(self, final: str, problem_answer: str) -> float:
        return float(len(final) % 2 == 0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<start>", "<end>", *(f"w{index}" for index in range(3, 128))]
    model = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w3"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.decoder = decoders.Fuse()
    built = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", bos_token="<start>", eos_token="<end>")
    built.chat_template = TEMPLATE
    return built


def greedy_by_hand(model: GptOssForCausalLM, prompt: list[int], cap: int, ends: set[int]) -> tuple[list[int], bool]:
    """One prompt, no padding, no cache: the whole sequence through the model for every token."""
    ids = list(prompt)
    for _ in range(cap):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            return ids[len(prompt) :], True
    return ids[len(prompt) :], False


@pytest.fixture
def stopping_model(tiny_model: GptOssForCausalLM, tokenizer: PreTrainedTokenizerFast) -> GptOssForCausalLM:
    """The tiny model with every fifth token an end token, so that some completions end and others are cut off."""
    tiny_model.generation_config.eos_token_id = [2, *range(5, 128, 10)]
    return tiny_model


def test_completions_equal_unbatched_uncached_decoding(
    stopping_model: GptOssForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    ends = {2, *range(5, 128, 10)}
    environment = Parity()
    problems = held_out_problems([environment], ["low", "high"], 9, seed=3)
    for batch_size in (1, 4, 64):
        engine = TransformersEngine(stopping_model, tokenizer, batch_size)
        fix_format(tokenizer, "whole")
        episodes = solve_problems(engine, tokenizer, problems, [environment], Sampling(10, 0.0))
        for (problem, effort), episode in zip(problems, episodes, strict=True):
            prompt = f"{problem.messages[0]['content']} {'w5 w6' if effort == 'high' else 'w7'}".split()
            ids = tokenizer.convert_tokens_to_ids(prompt)
            answer, finished = greedy_by_hand(stopping_model, ids, 10, ends)
            correct = float(len("".join(tokenizer.convert_ids_to_tokens(answer))) % 2 == 0)
            found = (episode.effort, episode.correct, episode.generated_tokens, episode.finished)
            assert found == (effort, correct, len(answer), finished)
    assert {episode.finished for episode in episodes} == {True, False}  # both kinds were tested


def test_an_unknown_environment_is_an_error(tiny_model: GptOssForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    problems = held_out_problems([Parity("other")], ["low"], 2, seed=0)
    engine = TransformersEngine(tiny_model, tokenizer, 2)
    with pytest.raises(ValueError, match=r"\['other'\] were given; the environments are \['parity'\]"):
        solve_problems(engine, tokenizer, problems, [Parity()], Sampling(4))


def test_held_out_problems_are_the_same_at_each_effort() -> None:
    problems = held_out_problems([Parity()], ["low", "high"], 5, seed=1)
    assert [p for p, _ in problems[:5]] == [p for p, _ in problems[5:]]
    assert [effort for _, effort in problems] == ["low"] * 5 + ["high"] * 5
    assert all(is_held_out(problem) for problem, _ in problems)


def episodes_of(effort: str, *rows: tuple[str, float, int, bool]) -> list[Episode]:
    return [
        Episode(
            name, effort, index, Verdict(right, "right" if right else "wrong"), tokens, "stop" if done else "length"
        )
        for index, (name, right, tokens, done) in enumerate(rows)
    ]


BEFORE = episodes_of("high", ("a", 1, 10, True), ("b", 0, 20, False), ("a", 0, 30, True), ("b", 1, 40, True))
AFTER = episodes_of("high", ("a", 1, 12, True), ("b", 1, 20, True), ("a", 0, 25, True), ("b", 1, 41, True))


def test_summary_by_hand() -> None:
    low = episodes_of("low", ("a", 0, 2, True), ("a", 0, 4, True))
    results = summarize(BEFORE + low)
    assert results["accuracy"] == pytest.approx(2 / 6)
    assert results["accuracy/high"] == 0.5
    assert results["accuracy_se/high"] == pytest.approx(math.sqrt((4 * 0.25 / 3) / 4))  # 0.2887
    assert results["tokens/high"] == 25.0
    assert results["tokens_se/high"] == pytest.approx(math.sqrt(500 / 3 / 4))  # deviations -15, -5, 5, 15
    assert results["finished/high"] == 0.75
    assert results["accuracy/low"] == 0.0 and results["accuracy_se/low"] == 0.0 and results["tokens_se/low"] == 1.0
    by_environment = {name: results[f"accuracy/high/{name}"] for name in ("a", "b")}
    assert by_environment == {"a": 0.5, "b": 0.5}
    assert results["tokens/high/a"] == 20.0 and results["finished/high/b"] == 0.5
    assert "accuracy/medium" not in results


def test_paired_comparison_by_hand() -> None:
    results = compare(BEFORE, AFTER)
    assert results["accuracy_gain/high"] == 0.25  # differences 0, 1, 0, 0
    assert results["accuracy_gain_se/high"] == pytest.approx(0.25)  # sqrt((3 * .0625 + .5625) / 3 / 4)
    assert results["tokens_gain/high"] == -0.5  # differences 2, 0, -5, 1
    assert results["tokens_gain_se/high"] == pytest.approx(math.sqrt((6.25 + 0.25 + 20.25 + 2.25) / 3 / 4))


def test_comparison_of_other_problems_is_refused() -> None:
    for other in (AFTER[:-1], AFTER[::-1], [replace(AFTER[0], problem=99), *AFTER[1:]]):
        with pytest.raises(ValueError, match="not of the same problems"):
            compare(BEFORE, other)


def test_one_answer_has_no_standard_error() -> None:
    with pytest.raises(ValueError, match="needs two"):
        mean_and_error([1.0])


def test_length_statistics() -> None:
    assert length_statistics([5, 1, 3, 2, 4]) == LengthStatistics(mean=3.0, p50=3.0, p95=5.0)
    assert length_statistics(list(range(1, 101))) == LengthStatistics(mean=50.5, p50=50.0, p95=95.0)
    assert length_statistics([7]) == LengthStatistics(7.0, 7.0, 7.0)


def _share_and_gather(rank: int, world: int, folder: str, count: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    problems = [(Problem("a", ({"role": "user", "content": str(index)},), ""), "low") for index in range(count)]
    mine = [
        Episode("a", "low", 0, Verdict(0.0, "wrong"), int(p.messages[0]["content"]))
        for p, _ in (problems[row] for row in local_rows(count))
    ]
    gathered = [episode.generated_tokens for episode in gather_episodes(mine)]
    Path(folder, f"rank{rank}.json").write_text(json.dumps([len(mine), gathered]))
    torch.distributed.destroy_process_group()


def test_two_processes_share_and_gather_in_order(tmp_path: Path) -> None:
    multiprocessing.start_processes(
        _share_and_gather, args=(2, str(tmp_path), 7), nprocs=2, start_method="fork", join=True
    )
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert results == [[4, list(range(7))], [3, list(range(7))]]


def test_without_processes_everything_is_local() -> None:
    assert gather_episodes(BEFORE) == BEFORE and local_rows(3) == range(3)


@pytest.fixture
def checkpoint(stopping_model: GptOssForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    stopping_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_stage_evaluates_a_folder_and_compares_with_another_run(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second, tmp_path / "third"):
        folder.mkdir()
    settings = {"sampling": Sampling(8, 0.0), "engine": EngineSettings("transformers", batch_size=4)}
    held_out = HeldOut([Parity()], ["low", "high"], 6, seed=1, answer_format="whole")
    results = evaluate(first, checkpoint, held_out, **settings)  # type: ignore[arg-type]
    episodes = read_episodes(first)
    assert results == summarize(episodes) | by_environment(episodes) and len(episodes) == 12
    tokens = [episode.generated_tokens for episode in episodes if episode.effort == "high"]
    assert read_lengths(first)["high"] == length_statistics(tokens)
    again = evaluate(second, checkpoint, held_out, **settings, baseline=first)  # type: ignore[arg-type]
    assert {key: again[key] for key in results} == results
    assert "+0.000 ± 0.000" in capsys.readouterr().out
    assert again["accuracy_gain/high"] == again["tokens_gain/low"] == again["tokens_gain_se/low"] == 0.0
    third = tmp_path / "third"
    with pytest.raises(ValueError, match=r"first/episodes\.parquet: its 12 episodes.*same environments, efforts"):
        evaluate(third, checkpoint, replace(held_out, seed=2), **settings, baseline=first)  # type: ignore[arg-type]
    (first / "episodes.parquet").write_text("")
    with pytest.raises(ValueError, match="its 0 episodes and the 12 problems"):
        evaluate(third, checkpoint, held_out, **settings, baseline=first)  # type: ignore[arg-type]
    assert not list(third.iterdir())


@pytest.mark.slow
def test_three_engines_give_the_rows_of_one(checkpoint: Path, tmp_path: Path) -> None:
    """10 problems twice each: no engine gets as many as another, and draws depend on seed, row and position only."""
    held_out = HeldOut([Parity()], ["low", "high"], 5, seed=1, answer_format="whole", samples_per_prompt=2)
    results, rows = [], []
    for engines in (1, 3):
        folder = tmp_path / str(engines)
        folder.mkdir()
        engine = EngineSettings("transformers", batch_size=4, data_parallel=engines)
        results.append(evaluate(folder, checkpoint, held_out, Sampling(8, 1.0, seed=5), engine))
        rows.append(read_episodes(folder))
    assert rows[0] == rows[1] and len(rows[0]) == 20
    assert results[0] == results[1]


def test_samples_of_a_prompt_are_drawn_apart_and_clustered(checkpoint: Path, tmp_path: Path) -> None:
    held_out = HeldOut([Parity()], ["low"], 6, seed=1, samples_per_prompt=3)
    results = evaluate(tmp_path, checkpoint, held_out, Sampling(8, 1.0), EngineSettings("transformers"))
    episodes = read_episodes(tmp_path)
    groups = [episodes[start : start + 3] for start in range(0, 18, 3)]
    assert len(episodes) == 18 and all(len({e.problem for e in group}) == 1 for group in groups)
    assert len({group[0].problem for group in groups}) == 6 and [e.row for e in episodes] == list(range(18))
    means = [sum(e.generated_tokens for e in group) / 3 for group in groups]
    assert results["tokens_se/low"] == pytest.approx(statistics.stdev(means) / math.sqrt(6))
    assert any(len({e.texts.completion for e in group if e.texts}) > 1 for group in groups)


def test_stage_refuses_bad_input_before_anything_slow(checkpoint: Path, tmp_path: Path) -> None:
    def run(**overrides: object) -> Callable[[], object]:
        arguments = {"run_dir": tmp_path, "checkpoint": checkpoint, "held_out": HeldOut([Parity()], ["low"])}
        return lambda: evaluate(**(arguments | overrides))  # type: ignore[arg-type]

    (tmp_path / "empty").mkdir()
    cases = {
        r"holds no config\.json": run(checkpoint=tmp_path / "empty"),
        "samples_per_prompt 2 was given with sampling.temperature 0": run(
            held_out=HeldOut([Parity()], ["low"], samples_per_prompt=2)
        ),
        "samples_per_prompt 0": lambda: HeldOut([Parity()], samples_per_prompt=0),
        "prompts_per_effort 1": lambda: HeldOut([Parity()], prompts_per_effort=1),
        "extreme": lambda: HeldOut([Parity()], ["extreme"]),
        r"baseline .*missing' does not exist": run(baseline=tmp_path / "missing"),
        r"holds no episodes\.parquet": run(baseline=tmp_path / "empty"),
        "names must differ": run(held_out=HeldOut([])),
        "no log-probabilities": run(sampling=Sampling(logprobs=True)),
        "without an FP8 cache": run(kv_scales=tmp_path),
        "simulated with transformers": run(kv_cache="fp8", engine=EngineSettings("vllm")),
    }
    for message, case in cases.items():
        with pytest.raises(ValueError, match=message):
            case()


def test_rows_show_what_was_asked_answered_and_why(checkpoint: Path, tmp_path: Path) -> None:
    settings = {"sampling": Sampling(8, 0.0), "engine": EngineSettings("transformers", batch_size=4)}
    held_out = HeldOut([Parity()], ["low", "high"], 6, seed=1, answer_format="whole")
    for name, texts in (("with", True), ("without", False)):
        (tmp_path / name).mkdir()
        evaluate(tmp_path / name, checkpoint, replace(held_out, texts=texts), **settings)  # type: ignore[arg-type]
    with_texts, without = read_episodes(tmp_path / "with"), read_episodes(tmp_path / "without")
    assert [replace(episode, texts=None) for episode in with_texts] == without
    assert [episode.row for episode in with_texts] == list(range(12))
    for (problem, effort), episode in zip(held_out.problems(), with_texts, strict=True):
        assert episode.texts is not None and episode.seconds is not None
        assert episode.texts.prompt == f"{problem.messages[0]['content']} {'w5 w6' if effort == 'high' else 'w7'}"
        assert episode.texts.answer == "even" and len(episode.texts.completion) % 2 == 1 - episode.correct
        assert episode.verdict.reason == ("right" if episode.correct else "wrong") and episode.analysis is None


def test_a_damaged_file_of_episodes_is_one_error(checkpoint: Path, tmp_path: Path) -> None:
    held_out = HeldOut([Parity()], ["low"], 4)
    (tmp_path / "before").mkdir()
    evaluate(tmp_path / "before", checkpoint, held_out, Sampling(4, 0.0), EngineSettings("transformers"))
    file = tmp_path / "before" / "episodes.parquet"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"episodes\.parquet cannot be read as Parquet") as refused:
        evaluate(tmp_path / "after", checkpoint, held_out, Sampling(4, 0.0), baseline=tmp_path / "before")
    assert "\n" not in str(refused.value)


def test_a_grader_that_fails_is_counted_and_gives_nothing(checkpoint: Path, tmp_path: Path) -> None:
    class Fragile(Parity):
        """Reads a number where there may be none."""

        def verify(self, final: str, problem_answer: str) -> float:
            return float(int(final.removeprefix("w")) > 0) if "w" in final else 0.0

    held_out = HeldOut([Fragile()], ["low"], 6, answer_format="whole")
    results = evaluate(tmp_path, checkpoint, held_out, Sampling(4, 0.0), EngineSettings("transformers"))
    reasons = [episode.verdict.reason for episode in read_episodes(tmp_path)]
    failed = [reason.startswith("grader failed: ValueError: invalid literal for int()") for reason in reasons]
    assert results["grader_failures"] == sum(failed) > 0 and results["accuracy/low"] == 0.0


def test_prompts_are_checked_before_the_model_is_loaded(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hostile(Parity):
        def problem(self, rng: random.Random) -> Problem:
            problem = super().problem(rng)
            return replace(problem, messages=({"role": "user", "content": problem.text() + " <end> w9"},))

    monkeypatch.setattr("lit_puzzle.evaluate.accuracy.load_engine", lambda *_: pytest.fail("the model was loaded"))
    for environment, tokens, message in (
        (Hostile(), 4, "parity: .*: the text contains '<end>', which is a control token"),
        (Parity(), 10**9, "parity: .*: the prompt has .* tokens; context - max_new_tokens leaves -"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(tmp_path, checkpoint, HeldOut([environment], ["low"], 4), Sampling(tokens))


def test_an_evaluation_that_was_killed_generates_what_is_missing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 between and inside blocks; after the last block, before the results; a block of other problems."""
    held_out = HeldOut([Parity()], ["low", "high"], 9, seed=1, block_size=4)
    settings = (held_out, Sampling(8, 1.0, seed=3), EngineSettings("transformers", batch_size=3))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    results = evaluate(whole, checkpoint, *settings)
    assert sorted(path.name for path in whole.iterdir()) == [
        *("episodes.parquet", "generation_lengths.json", "inputs.json", "outputs.json"),
    ]
    process = multiprocessing.get_context("spawn").Process(target=_killed_after_10, args=(killed, checkpoint, settings))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    blocks = {path.name: path.stat().st_mtime_ns for path in (killed / "blocks").iterdir()}
    log = "block-00002.completions.jsonl"
    assert sorted(blocks) == ["block-00000.parquet", "block-00001.parquet", log]
    assert len((killed / "blocks" / log).read_text().splitlines()) == 2 and not (killed / "episodes.parquet").exists()
    with (killed / "blocks" / log).open("a") as stream:
        stream.write('{"row": 11, "token_ids": [5')  # of a kill while it was written
    first = (killed / "blocks" / "block-00000.parquet").read_bytes()
    (killed / "blocks" / "block-00001.parquet").write_bytes(first)
    with pytest.raises(ValueError, match=r"block-00001\.parquet has 4 episodes, not those of problems 4 to 7"):
        evaluate(killed, checkpoint, *settings)
    (killed / "blocks" / "block-00001.parquet").unlink()
    asked: list[int] = []
    generate = TransformersEngine.generate

    def counted(engine: TransformersEngine, prompts: Any, sampling: Sampling, rows: Any, on_completion: Any) -> Any:
        asked.extend(rows)
        return generate(engine, prompts, sampling, rows, on_completion)

    monkeypatch.setattr(TransformersEngine, "generate", counted)
    assert evaluate(killed, checkpoint, *settings) == results and not (killed / "blocks").exists()
    assert len(asked) == len(set(asked)) == 4 + 2 + 6 and set(asked) > {4, 5, 6, 7, 12, 13, 14, 15, 16, 17}
    assert read_episodes(killed) == read_episodes(whole)
    before = (killed / "episodes.parquet").read_bytes()
    (killed / "generation_lengths.json").unlink()  # killed after the last completion
    assert evaluate(killed, checkpoint, *settings) == results
    assert (killed / "episodes.parquet").read_bytes() == before


def _killed_after_10(run_dir: Path, checkpoint: Path, settings: tuple[HeldOut, Sampling, EngineSettings]) -> None:
    """Evaluate in blocks of 4; the process is killed when the second completion of the third block is written."""
    generate, ended = TransformersEngine.generate, list[int]()

    def until_10(engine: TransformersEngine, prompts: Any, sampling: Sampling, rows: Any, on_completion: Any) -> Any:
        def killed(row: int, completion: Any) -> None:
            on_completion(row, completion)
            ended.append(row)
            if len(ended) == 10:
                os.kill(os.getpid(), signal.SIGKILL)

        return generate(engine, prompts, sampling, rows, killed)

    TransformersEngine.generate = until_10  # type: ignore[method-assign, assignment]
    evaluate(run_dir, checkpoint, *settings)
