"""generation_length.py: quantiles against numpy, windows under a real Trainer, one = two processes, resume, budgets."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lit_puzzle.callbacks.generation_length import GenerationLength, LengthHistogram, histogram_statistics
from lit_puzzle.environments.environment import EFFORTS
from lit_puzzle.generation.lengths import LengthStatistics, write_lengths

ENVIRONMENTS = ["a", "b"]
CAP = 50


def rollout(step: int, scale: int = 1) -> dict[str, Any]:
    """24 completions, different at each step; environment b never appears at low effort."""
    rng = np.random.default_rng(step)
    efforts = [EFFORTS[index % 3] for index in range(24)]
    names = ["a" if effort == "low" else ENVIRONMENTS[int(rng.integers(2))] for effort in efforts]
    lengths = [int(rng.integers(1, 10) * (1 + EFFORTS.index(effort)) * scale) for effort in efforts]
    return {
        "completion_lengths": torch.tensor(lengths).clamp(max=CAP),
        "truncated": torch.tensor(lengths) > CAP,
        "effort": efforts,
        "environment": names,
    }


class Policy(LightningModule):
    """Reports rollouts on every second step, as a policy that updates twice on each; processes share a rollout."""

    def __init__(self, scale: int = 1, dropped: str | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.scale = scale
        self.dropped = dropped
        self.logged: list[dict[str, float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        outputs: dict[str, Any] = {"loss": self.weight.sum()}
        if self.global_step % 2 == 0:
            everything = rollout(self.global_step, self.scale)
            rows = list(range(24))
            if self.trainer.world_size == 2:  # environment b on one process only, a on both
                first = [row for row in rows if everything["environment"][row] == "a" and row < 14]
                rows = [first, sorted(set(rows) - set(first))][self.trainer.global_rank]
            for key, values in everything.items():
                kept = [values[row] for row in rows]
                outputs[key] = torch.stack(kept) if isinstance(values, Tensor) else kept
            if self.dropped is not None:
                outputs.pop(self.dropped, None)
        return outputs

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.logged.append(length_metrics(self.trainer))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def length_metrics(trainer: Trainer) -> dict[str, float]:
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("length/")}


def fit(folder: Path, callback: GenerationLength, policy: Policy, steps: int, **options: Any) -> Trainer:
    settings: dict[str, Any] = {"devices": 1, "enable_checkpointing": False} | options
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[callback, *settings.pop("callbacks", [])],
        **settings,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(policy, DataLoader(torch.zeros(100, 1)), ckpt_path=ckpt_path)  # type: ignore[arg-type]
    return trainer


def by_hand(steps: list[int], effort: str, environment: str | None = None) -> dict[str, float]:
    """The statistics of some rollouts, from plain lists with numpy."""
    rows = [
        (int(out["completion_lengths"][row]), bool(out["truncated"][row]))
        for out in map(rollout, steps)
        for row in range(24)
        if out["effort"][row] == effort and environment in (None, out["environment"][row])
    ]
    lengths = [tokens for tokens, _ in rows]
    p50, p95 = np.quantile(lengths, [0.5, 0.95], method="inverted_cdf")
    return {"mean": float(np.mean(lengths)), "p50": p50, "p95": p95, "cut": float(np.mean([cut for _, cut in rows]))}


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 200])
def test_histogram_equals_numpy_and_is_bounded(count: int) -> None:
    lengths = np.random.default_rng(count).integers(1, 64, count)
    cut = lengths > 60
    metric = LengthHistogram(num_groups=3, bin_tokens=1, num_bins=64)
    for part in np.array_split(np.arange(count), 3):
        metric.update(torch.tensor(lengths[part]), torch.tensor(cut[part]), torch.full((len(part),), 1))
    sums = metric.compute()
    assert sums["counts_GN"].sum(1).tolist() == [0, count, 0] and sums["counts_GN"].shape == (3, 64)
    found = histogram_statistics(sums["counts_GN"][1], sums["tokens_G"][1], sums["cut_G"][1], 1)
    p50, p95 = np.quantile(lengths, [0.5, 0.95], method="inverted_cdf")
    assert found == {"mean": pytest.approx(lengths.mean()), "p50": p50, "p95": p95, "cut": cut.mean()}


def test_wide_bins_round_quantiles_up_and_keep_means() -> None:
    metric = LengthHistogram(num_groups=2, bin_tokens=10, num_bins=3)
    metric.update(torch.tensor([1, 10, 11, 500]), torch.tensor([False] * 4), torch.zeros(4, dtype=torch.int64))
    sums = metric.compute()
    assert sums["counts_GN"].tolist() == [[2, 1, 1], [0, 0, 0]]
    found = histogram_statistics(sums["counts_GN"][0], sums["tokens_G"][0], sums["cut_G"][0], 10)
    assert found == {"mean": 130.5, "p50": 10.0, "p95": 30.0, "cut": 0.0}


def test_windows_drift_and_ratio_under_a_trainer(tmp_path: Path) -> None:
    write_lengths(tmp_path, {"high": LengthStatistics(mean=4.0, p50=4.0, p95=9.0)})
    callback = GenerationLength(child=tmp_path, environments=ENVIRONMENTS, window=2, max_tokens=CAP)
    policy = Policy()
    logged = length_metrics(fit(tmp_path, callback, policy, steps=10))  # rollouts at 0 2 | 4 6 | 8
    assert policy.logged[2] == {} and policy.logged[3] != {}  # nothing before a window is complete
    for effort in EFFORTS:
        for environment in (None, "a", "b"):
            if (effort, environment) == ("low", "b"):
                continue
            prefix = f"length/{effort}" + (f"/{environment}" if environment else "")
            expected = by_hand([4, 6], effort, environment)
            assert {name: logged[f"{prefix}/{name}"] for name in expected} == pytest.approx(expected)
    assert not [key for key in logged if key.startswith("length/low/b")]  # no completions, no metrics
    high, low = by_hand([4, 6], "high")["mean"], by_hand([4, 6], "low")["mean"]
    assert logged["length/high/drift"] == pytest.approx(high / 4.0) and "length/low/drift" not in logged
    assert logged["length/effort_ratio"] == pytest.approx(high / low)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    def run(devices: int) -> dict[str, float]:
        callback = GenerationLength(environments=ENVIRONMENTS, window=2, max_tokens=CAP)
        strategy = "auto" if devices == 1 else "ddp_fork"
        return length_metrics(fit(tmp_path, callback, Policy(), steps=8, devices=devices, strategy=strategy))

    one, two = run(1), run(2)
    assert one == two and one["length/high/b/mean"] > 0


def test_resumed_equals_uninterrupted_in_the_middle_of_a_window(tmp_path: Path) -> None:
    def make() -> GenerationLength:
        return GenerationLength(environments=ENVIRONMENTS, window=3, max_tokens=CAP)

    whole = length_metrics(fit(tmp_path, make(), Policy(), steps=12))  # the last window is rollouts 6, 8, 10
    saver = ModelCheckpoint(dirpath=tmp_path, filename="middle", every_n_train_steps=9)
    first = make()
    fit(tmp_path, first, Policy(), steps=9, callbacks=[saver], enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "middle.ckpt", weights_only=True)  # tensors and plain Python only
    assert checkpoint["callbacks"]["GenerationLength"]["rollouts"] == 2
    resumed = fit(tmp_path, make(), Policy(), steps=12, ckpt_path=tmp_path / "middle.ckpt")
    assert length_metrics(resumed) == whole
    assert whole["length/high/mean"] == pytest.approx(by_hand([6, 8, 10], "high")["mean"])
    other = GenerationLength(environments=["a"], window=3, max_tokens=CAP)
    with pytest.raises(ValueError, match="Resume with the settings of the checkpoint"):
        other.load_state_dict(first.state_dict())


def test_budget_warns_once_and_stops_by_option(tmp_path: Path) -> None:
    def run(budget: float, stop: bool) -> tuple[Trainer, list[str]]:
        callback = GenerationLength(
            environments=ENVIRONMENTS, budget_tokens={"high": budget}, stop_on_budget=stop, window=1, max_tokens=CAP
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = fit(tmp_path, callback, Policy(scale=5), steps=10)
        return trainer, [str(warning.message) for warning in caught if "over the budget" in str(warning.message)]

    trainer, warned = run(budget=20.0, stop=False)
    assert trainer.global_step == 10 and len(warned) == 1 and "over the budget of 20" in warned[0]
    trainer, warned = run(budget=20.0, stop=True)
    assert trainer.global_step == 1 and len(warned) == 1
    trainer, warned = run(budget=float(CAP), stop=True)
    assert trainer.global_step == 10 and not warned


def test_wrong_outputs_and_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"all of .* are needed, or none"):
        fit(tmp_path, GenerationLength(environments=ENVIRONMENTS), Policy(dropped="effort"), steps=1)
    with pytest.raises(ValueError, match=r"Completions of \['b'\]"):
        fit(tmp_path, GenerationLength(environments=["a"]), Policy(), steps=5)
    with pytest.raises(ValueError, match="knows no environments"):
        fit(tmp_path, GenerationLength(), Policy(), steps=1)
    with pytest.raises(ValueError, match=r"child .*nowhere' does not exist"):
        GenerationLength(child=tmp_path / "nowhere")
    with pytest.warns(UserWarning, match=r"carries no generation_lengths\.json"):
        assert GenerationLength(child=tmp_path).parent == {}
    for bad in ({"window": 0}, {"num_bins": 0}, {"budget_tokens": {"extreme": 3.0}}, {"budget_tokens": {"low": 0.0}}):
        with pytest.raises(ValueError, match=r"window|budget"):
            GenerationLength(**bad)


def test_loops_are_counted_where_token_ids_are_given(tmp_path: Path) -> None:
    class Ids(Policy):
        """The first three of 24 completions, one at each effort, end in a loop."""

        def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
            outputs = super().training_step(batch, batch_idx)
            if "effort" in outputs:
                outputs["completion_ids"] = [[7] * 64 if row < 3 else list(range(64)) for row in range(24)]
            return outputs

    callback = GenerationLength(environments=ENVIRONMENTS, window=1, max_tokens=CAP)
    values = length_metrics(fit(tmp_path, callback, Ids(), steps=3))
    assert [values[f"length/{effort}/looping"] for effort in EFFORTS] == [1 / 8] * 3
    assert values["length/low/a/looping"] == 1 / 8
    without = length_metrics(fit(tmp_path, GenerationLength(environments=ENVIRONMENTS, window=1), Policy(), steps=3))
    assert not any("looping" in key for key in without)


def test_state_is_plain_and_of_the_stated_size(tmp_path: Path) -> None:
    callback = GenerationLength(environments=ENVIRONMENTS, window=9, max_tokens=CAP)
    fit(tmp_path, callback, Policy(), steps=1)
    state = callback.state_dict()
    sums = state.pop("sums")
    assert json.loads(json.dumps(state)) == state
    stated = 3 * len(ENVIRONMENTS) * (4096 + 3) * 8
    assert sum(tensor.numel() * tensor.element_size() for tensor in sums.values()) == stated
