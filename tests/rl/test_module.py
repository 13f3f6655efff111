"""The recovery module: equal to pure TRL through Lightning, killed and resumed bit for bit, and what it writes."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.grpo_settings import change
from helpers.recovery_runs import (
    GRPO,
    Fingerprint,
    Recorder,
    checkpoints,
    fit,
    forked,
    kill_self,
    losses,
    make_child,
    make_data,
    make_module,
    make_trainer,
    many_even_tokens,
    validations,
)
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer

from lit_puzzle.child.save import save_child
from lit_puzzle.environments.answer_formats import answer_format
from lit_puzzle.environments.episodes import Episode, Verdict
from lit_puzzle.evaluate.accuracy import read_episodes
from lit_puzzle.evaluate.before_after import print_table, recovery_results, validation_values
from lit_puzzle.evaluate.held_out import held_out_problems
from lit_puzzle.evaluate.solving import solve_problems
from lit_puzzle.generation.lengths import LengthStatistics
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.model.loading import load_model
from lit_puzzle.rl.module import RLRecovery
from lit_puzzle.rl.rewards import Correctness
from lit_puzzle.rl.settings import RewardSettings
from lit_puzzle.rl.trl_config import grpo_config
from lit_puzzle.tiny.world import Counting
from lit_puzzle.training.best_weights import load_best
from lit_puzzle.training.checkpoints import BestCheckpoint, UpdateCheckpoint
from lit_puzzle.training.lightning import sound_checkpoint
from lit_puzzle.training.settings import LoraSettings, TrainingSettings
from lit_puzzle.training.trainable import freeze_parameters
from lit_puzzle.training.trainer_validation import check_trainer

STEPS = 14


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Path:
    return make_child(tmp_path_factory.mktemp("recovery") / "child", tiny_config(num_hidden_layers=2))


@pytest.fixture(scope="module")
def whole_run(child: Path) -> Path:
    """An uninterrupted run."""
    folder = child.parent / "whole"
    assert forked(1, lambda _: fit(folder, child, STEPS)) == [0]
    return folder


@pytest.mark.slow
def test_final_weights_equal_grpo_trainer(whole_run: Path, child: Path, tmp_path: Path) -> None:
    """The same policy, optimizer, schedule and clipping in `GRPOTrainer.train()` end in the same bits."""

    def train(_: int) -> None:
        tokenizer = AutoTokenizer.from_pretrained(child, padding_side="left")
        policy = AutoModelForCausalLM.from_pretrained(
            child, dtype="float32", attn_implementation="sink_attention", experts_implementation="grouped_mm"
        )
        freeze_parameters(policy, ["*.mlp.experts.*", "*.mlp.router.*"])
        config = grpo_config(GRPO, 2, "32-true", torch.device("cpu"), tmp_path, reward_weights=[1.0, 1.0])
        config.max_steps, config.max_grad_norm = STEPS, 1.0
        optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=3e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 20)
        data = make_data()
        GRPOTrainer(
            model=policy,
            reward_funcs=[Correctness(tuple(data.environments), tokenizer, answer_format(tokenizer)), many_even_tokens],
            args=config,
            train_dataset=data.train_prompts(tokenizer),
            processing_class=tokenizer,
            optimizers=(optimizer, schedule),
        ).train()
        torch.save({name: p for name, p in policy.named_parameters() if p.requires_grad}, tmp_path / "theirs.pt")

    assert forked(1, train) == [0]
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=True)
    ours = torch.load(whole_run / "weights.pt", weights_only=True)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    start = load_file(child / "model.safetensors")
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
        assert not torch.equal(tensor, start[name].float()), f"{name} was not trained"


def newest_name(folder: Path) -> str | None:
    newest = sound_checkpoint(folder)
    return None if newest is None else newest.name


@pytest.mark.slow
def test_killed_runs_resume_bit_for_bit(whole_run: Path, child: Path) -> None:
    """Killed between updates, inside checkpoint writing, after an epoch, then uninterrupted: the same in every bit."""
    folder = child.parent / "killed"

    def between_updates(step: int) -> None:
        if step == 6:
            kill_self()

    def inside_writing(step: int) -> None:
        if step == 7:  # the checkpoint of step 8 dies after its shards, before its meta.pt
            torch.save = lambda *_, **__: kill_self()

    def in_second_epoch(step: int) -> None:
        if step == 9:
            kill_self()

    assert forked(1, lambda _: fit(folder, child, STEPS, between_updates)) == [-9]
    assert forked(1, lambda _: fit(folder, child, STEPS, inside_writing)) == [-9]
    assert any(path.name.endswith(".partial") for path in (folder / "checkpoints").iterdir())
    assert newest_name(folder) == "step=4.ckpt"
    assert forked(1, lambda _: fit(folder, child, STEPS, in_second_epoch)) == [-9]
    assert newest_name(folder) == "step=8.ckpt"  # an epoch is 8 updates: resumed exactly at its end
    assert forked(1, lambda _: fit(folder, child, STEPS)) == [0]
    assert validations(folder) == validations(whole_run)
    assert [step for step, _ in validations(whole_run)] == [4, 8, 12]
    assert losses(folder) == losses(whole_run)
    assert len(losses(folder)) == 2 * STEPS and len(set(losses(folder).values())) > STEPS
    ours, theirs = (torch.load(run / "weights.pt", weights_only=True) for run in (folder, whole_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (folder / "results.json").read_text() == (whole_run / "results.json").read_text()
    assert json.loads((folder / "results.json").read_text())["reward/last"] != 0


SCORES = {2: 0.1, 4: 0.5, 6: 0.6, 8: 0.4, 10: 0.2, 12: 0.3, 14: 0.1}  # checkpoints to resume from at 4, 8 and 12


def killer(at: int) -> Callable[[int], None]:
    return lambda step: kill_self() if step == at else None


@pytest.mark.slow
def test_killed_runs_validate_alike_and_keep_the_best_weights(child: Path) -> None:
    """Killed after the best, inside a validation where a checkpoint is due, and late: the same best at the end."""

    def inside_validation(step: int) -> None:
        if step == 8:
            Recorder.on_validation_end = lambda *_: kill_self()  # type: ignore[method-assign]

    def run(folder: Path, on_step: Callable[[int], None] | None = None) -> list[int | None]:
        return forked(1, lambda _: fit(folder, child, STEPS, on_step, SCORES, val_check_interval=4))

    whole, killed = child.parent / "scored", child.parent / "scored and killed"
    assert run(whole) == [0]
    assert run(killed, killer(7)) == [-9]
    assert newest_name(killed) == "step=4.ckpt" and (killed / "best" / "step=6.ckpt").is_dir()
    assert run(killed, inside_validation) == [-9]
    assert newest_name(killed) == "step=4.ckpt"
    assert run(killed, killer(13)) == [-9]
    assert newest_name(killed) == "step=12.ckpt"
    assert run(killed) == [0]
    assert validations(killed) == validations(whole)
    assert [step for step, _ in validations(whole)] == list(SCORES)
    assert (killed / "best.txt").read_text() == (whole / "best.txt").read_text() == "step=6.ckpt"
    ours, theirs = (load_file(folder / "child" / "model.safetensors") for folder in (killed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    last = torch.load(whole / "weights.pt", weights_only=True)
    assert any(not torch.equal(last[name].bfloat16(), theirs[name]) for name in last), "the best are the last"
    assert {path.name for path in (killed / "best").iterdir()} == {"step=6.ckpt"}


@pytest.mark.slow
def test_an_older_best_stays_until_no_checkpoint_names_it(child: Path) -> None:
    """On a GPU a resumed run need not repeat itself bit for bit, and its best may be the older one."""
    folder, lower = child.parent / "overtaken", SCORES | {6: 0.3}
    assert forked(1, lambda _: fit(folder, child, 8, killer(7), SCORES, val_check_interval=4)) == [-9]
    (folder / "validated.jsonl").unlink()
    assert forked(1, lambda _: fit(folder, child, 8, None, lower, val_check_interval=4)) == [0]
    assert [step for step, _ in validations(folder)] == [6, 8]
    assert (folder / "best.txt").read_text() == "step=4.ckpt"


def test_early_stopping_by_a_callback(child: Path) -> None:
    """Lightning's own, resumed after a kill: stops after two validations without progress; the best come back."""
    folder, scores = child.parent / "stopped", {2: 0.5, 4: 0.4, 6: 0.3, 8: 0.2}

    def run(on_step: Callable[[int], None] | None) -> list[int | None]:
        stop = EarlyStopping("val/accuracy", mode="max", patience=2)
        return forked(1, lambda _: fit(folder, child, STEPS, on_step, scores, [stop], val_check_interval=4))

    assert run(killer(5)) == [-9]
    assert run(None) == [0]
    assert [step for step, _ in validations(folder)] == [2, 4, 6]
    assert (folder / "best.txt").read_text() == "step=2.ckpt"


def test_missing_best_weights_are_named() -> None:
    best = BestCheckpoint()
    best.load_state_dict({"score": 0.5, "name": "step=4.ckpt"})
    module: Any = SimpleNamespace(trainer=SimpleNamespace(callbacks=[best]))
    with pytest.raises(ValueError, match=r"step=4.ckpt \(val/accuracy = 0.5\) are missing"):
        load_best(module)
    with pytest.raises(ValueError, match="max and min"):
        BestCheckpoint(mode="most")  # type: ignore[arg-type]


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)])
@pytest.mark.slow
def test_evaluates_the_saved_weights_on_other_prompts_than_validation(
    child: Path, tmp_path: Path, lora: LoraSettings | None
) -> None:
    """The saved folder, loaded anew in float32, gives the logits of the evaluated model and the episodes of `after`."""

    def run(_: int) -> None:
        module, data = (
            make_module(child, training=TrainingSettings(lora=lora), rewards=RewardSettings(answer_format="whole")),
            make_data(environments=[Fingerprint(), Counting()]),
        )
        ids, trained = torch.arange(20).reshape(2, 10) + 8, []

        def logits(model: Any) -> torch.Tensor:
            with torch.no_grad():
                return model.eval()(input_ids=ids).logits

        module.on_train_end = lambda: trained.append(logits(module.policy))  # type: ignore[method-assign]
        make_trainer(tmp_path, 1, 4, [Recorder(tmp_path), *checkpoints()]).fit(module, datamodule=data)
        saved = load_model(tmp_path / "child", "float32", "sink_attention")
        assert torch.equal(logits(saved), logits(module.policy))
        assert not torch.equal(logits(saved), trained[0]), "nothing was rounded"
        after, settings = read_episodes(tmp_path / "after"), module.evaluation
        pairs = held_out_problems(data.environments, ["low", "high"], settings.prompts_per_effort, settings.seed)
        plain = load_model(tmp_path / "child", "float32")
        engine, sampling = TransformersEngine(plain, module.tokenizer, settings.batch_size), Sampling(6, 0.0)
        expected = solve_problems(engine, module.tokenizer, pairs, data.environments, sampling)
        assert after == expected != read_episodes(tmp_path / "before")
        validated = {problem.text() for batch in data.val_dataloader() for problem, _ in batch}
        assert len(validated) == 4 and not validated & {problem.text() for problem, _ in pairs}

    assert forked(1, run) == [0]


def test_finished_run_reports_and_writes_the_child(whole_run: Path, child: Path) -> None:
    results = json.loads((whole_run / "results.json").read_text())
    for effort in ("low", "high"):
        for name in ("before", "after", "gain"):
            assert {f"accuracy/{effort}/{name}", f"tokens/{effort}/{name}"} <= results.keys()
    assert results["reward/last"] > results["reward/first"]
    before, after = load_file(child / "model.safetensors"), load_file(whole_run / "child" / "model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    for name, tensor in before.items():
        frozen = ".experts." in name or ".router." in name
        assert torch.equal(tensor, after[name]) == frozen, name
    for path in child.iterdir():
        if path.suffix != ".safetensors":
            assert path.read_bytes() == (whole_run / "child" / path.name).read_bytes()
    assert fingerprint(whole_run / "child") != fingerprint(child)
    AutoModelForCausalLM.from_pretrained(whole_run / "child")


def test_checkpoints_contain_trainable_parameters_and_their_state_only(whole_run: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    newest = sound_checkpoint(whole_run)
    assert newest is not None
    names = FileSystemReader(newest).read_metadata().state_dict_metadata
    weights = [name for name in names if name.startswith("state_dict.")]
    assert any("q_proj" in name for name in weights)
    assert not [name for name in names if ".experts." in name or ".router." in name]
    moments = [name for name in names if name.endswith("exp_avg")]
    assert len(moments) == len(weights)


def test_lora_trains_adapters_and_saves_them_merged(child: Path, tmp_path: Path) -> None:
    """The saved child has the logits of the policy with its adapters (in float32, up to rounding)."""

    def compare(module: RLRecovery) -> None:
        source = tmp_path / "float32"
        AutoModelForCausalLM.from_pretrained(child, dtype="float32").save_pretrained(source)
        save_child(source, tmp_path / "merged", module.model, is_writer=True)
        ids = torch.arange(20).reshape(2, 10) + 8
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
        plain = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
        module.policy.eval()
        with torch.no_grad():
            adapted = module.policy(input_ids=ids).logits
            torch.testing.assert_close(merged(input_ids=ids).logits, adapted, atol=2e-5, rtol=1e-4)
            assert (plain(input_ids=ids).logits - adapted).abs().max() > 1e-3
        (tmp_path / "compared").touch()

    def run(_: int) -> None:
        trainer = make_trainer(tmp_path, 1, 4, [Recorder(tmp_path), *checkpoints()])
        adapters = TrainingSettings(lora=LoraSettings(rank=4))
        grpo = change(GRPO, steps_per_generation=2, num_iterations=1, loss_type="dapo", beta=0.05)
        module = make_module(child, training=adapters, grpo=grpo)
        module.on_train_end = lambda: compare(module)  # type: ignore[method-assign]
        trainer.fit(module, datamodule=make_data())

    assert forked(1, run) == [0] and (tmp_path / "compared").is_file()
    newest = sound_checkpoint(tmp_path)
    assert newest is not None
    from torch.distributed.checkpoint import FileSystemReader

    names = [name for name in FileSystemReader(newest).read_metadata().state_dict_metadata if "state_dict." in name]
    assert names and all(".lora_" in name for name in names)


def test_impossible_settings_are_refused(child: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"The child .* holds no config\.json"):
        make_module(tmp_path)
    with pytest.raises(ValueError, match=r"needs `training\.lora`"):
        make_module(child, grpo=change(GRPO, beta=0.1))
    module = make_module(child, grpo=change(GRPO, num_generations=3))
    module.trainer = make_trainer(tmp_path, 1, 1, [], strategy="auto")
    module.trainer.datamodule = make_data()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="multiple of 3"):
        module.setup("fit")
    model = AutoModelForCausalLM.from_pretrained(child)
    with pytest.raises(ValueError, match="matches no parameter"):
        freeze_parameters(model, ["*.expert.*"])
    with pytest.raises(ValueError, match="nothing to train"):
        freeze_parameters(model, ["*"])


def test_refuses_checkpoints_between_updates_and_unsharded_processes(tmp_path: Path) -> None:
    plain = ModelCheckpoint(every_n_train_steps=5)
    with pytest.raises(ValueError, match="UpdateCheckpoint"):
        check_trainer(make_trainer(tmp_path, 1, 1, [plain], strategy="auto"), "float32")
    check_trainer(make_trainer(tmp_path, 1, 1, [UpdateCheckpoint(), BestCheckpoint()], strategy="auto"), "float32")
    with pytest.raises(ValueError, match="gradients would not be averaged"):
        check_trainer(make_trainer(tmp_path, 2, 1, [], strategy="ddp"), "float32")
    with pytest.raises(ValueError, match="use_distributed_sampler: false"):
        check_trainer(make_trainer(tmp_path, 2, 1, [], use_distributed_sampler=True), "float32")
    with pytest.raises(ValueError, match="precision=bf16-true was given; trained weights stay in float32"):
        check_trainer(make_trainer(tmp_path, 1, 1, [], strategy="auto", precision="bf16-true"), "bfloat16")


def test_results_are_paired() -> None:
    def episodes(right: list[int], tokens: list[int]) -> list[Episode]:
        rows = zip(right, tokens, strict=True)
        return [
            Episode("chains", "high", index, Verdict(float(ok), ""), count) for index, (ok, count) in enumerate(rows)
        ]

    before, after = episodes([0, 1, 0, 1], [4, 6, 8, 6]), episodes([1, 1, 0, 1], [4, 5, 8, 6])
    results = recovery_results(before, after, [0.1, *[0.5] * 18, 0.9])
    assert results["accuracy/high/gain"] == 0.25
    assert results["accuracy/high/gain_se"] == pytest.approx(0.25)  # differences 1, 0, 0, 0
    assert results["tokens/high/gain"] == -0.25
    assert "tokens/high/of_parent" not in results and "effort_length_ratio/after" not in results
    assert (results["reward/first"], results["reward/last"]) == pytest.approx((0.3, 0.7))


def test_results_tell_how_completions_end(capsys: pytest.CaptureFixture[str]) -> None:
    """Two problems at each effort; the parent has 4 and 8 tokens."""

    def episodes(*rows: tuple[str, int, Verdict]) -> list[Episode]:
        return [
            Episode("chains", effort, index, verdict, tokens, "length" if verdict.looping else "stop")
            for index, (effort, tokens, verdict) in enumerate(rows)
        ]

    right, loop = Verdict(1.0, "", True, False), Verdict(0.0, "cut off", False, True)
    before = episodes(("low", 5, right), ("low", 5, right), ("high", 10, right), ("high", 30, loop))
    after = episodes(("low", 4, right), ("low", 4, right), ("high", 6, right), ("high", 6, right))
    parent = {effort: LengthStatistics(mean, mean, mean) for effort, mean in (("low", 4.0), ("high", 8.0))}
    results = recovery_results(before, after, [], parent)
    assert (results["tokens/low/of_parent"], results["tokens/high/of_parent"]) == (1.0, 0.75)
    assert results["tokens/high/parent"] == 8.0
    assert [results[f"effort_length_ratio/{when}"] for when in ("before", "after", "parent")] == [4.0, 1.5, 2.0]
    for name in ("unfinished", "no_final", "looping", "no_analysis"):
        assert [results[f"{name}/high/{when}"] for when in ("before", "after")] == [0.5, 0.0]
        assert results[f"{name}/low/before"] == 0.0
    print_table(results)
    printed = capsys.readouterr().out
    assert "50.0 → 0.0 " in printed and "looping, %" in printed and "0.75" in printed
    values = validation_values(before)
    assert (values["val/looping/high"], values["val/unfinished/high"], values["val/no_analysis/low"]) == (0.5, 0.5, 0.0)
