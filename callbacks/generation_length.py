"""Watches how long the policy's completions are: per effort and environment, against the parent, and against a budget.

Reads: `generation_lengths.json` of the child's folder (the parent's lengths). Writes: logged metrics (table below), and
its unfinished window into the checkpoint.

    length/<effort>/mean|p50|p95        generated tokens, the end token included
    length/<effort>/cut                 share of completions cut off at the cap
    length/<effort>/looping             share of completions that end in a loop (only with their token ids)
    length/<effort>/drift               mean / the parent's mean at that effort (only with `child`)
    length/<effort>/<environment>/mean|p50|p95|cut|looping
    length/effort_ratio                 mean at high effort / mean at low effort

A window is the completions of the last `window` rollouts of all processes; every number is of one window.
Memory and traffic (one reduction a rollout): efforts * environments * (bins + 3) * 8 bytes a process.
Source: arXiv 2602.11937 (RL at high effort alone lengthens completions: 15.6K -> 21.6K tokens; effort length ratio).
Shapes: B completions, G groups (effort x environment), N histogram bins.
"""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lit_puzzle.data.rl_prompts import PromptData
from lit_puzzle.environments.environment import EFFORTS
from lit_puzzle.environments.looping import is_looping
from lit_puzzle.generation.lengths import LENGTHS_FILE, LengthStatistics, read_lengths
from lit_puzzle.run.folder import require_input

ROLLOUT_KEYS = ("completion_lengths", "truncated", "effort", "environment")
SUMS = ("counts_GN", "tokens_G", "cut_G", "looping_G")


class LengthHistogram(Metric):
    """Counts of lengths per group, in bins of `bin_tokens`; sums over processes, of bounded size.

    Quantiles are upper edges of bins: exact for lengths up to `num_bins` tokens if `bin_tokens` is 1. Longer ones
    fall into the last bin; means stay exact.
    """

    full_state_update = False
    counts_GN: Tensor
    tokens_G: Tensor
    cut_G: Tensor
    looping_G: Tensor

    def __init__(self, num_groups: int, bin_tokens: int, num_bins: int) -> None:
        super().__init__()
        self.bin_tokens = bin_tokens
        self.add_state("counts_GN", torch.zeros(num_groups, num_bins, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("tokens_G", torch.zeros(num_groups, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("cut_G", torch.zeros(num_groups, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("looping_G", torch.zeros(num_groups, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, lengths_B: Tensor, cut_B: Tensor, groups_B: Tensor, looping_B: Tensor | None = None) -> None:
        """Add completions: tokens (>= 1), whether cut off, group index, and whether looping, if that is known."""
        num_bins = self.counts_GN.shape[1]
        bins_B = ((lengths_B - 1) // self.bin_tokens).clamp(0, num_bins - 1)
        self.counts_GN.view(-1).index_add_(0, groups_B * num_bins + bins_B, torch.ones_like(bins_B))
        self.tokens_G.index_add_(0, groups_B, lengths_B)
        self.cut_G.index_add_(0, groups_B, cut_B.long())
        if looping_B is not None:
            self.looping_G.index_add_(0, groups_B, looping_B.long())

    def compute(self) -> dict[str, Tensor]:
        """Return the counts of all processes."""
        sums = (self.counts_GN, self.tokens_G, self.cut_G, self.looping_G)
        return {name: total.clone() for name, total in zip(SUMS, sums)}


def histogram_statistics(counts_N: Tensor, tokens: Tensor, cut: Tensor, bin_tokens: int) -> dict[str, float]:
    """Return mean, p50, p95 and cut of at least one completion; a quantile is the upper edge of its first bin."""
    total = int(counts_N.sum())
    cumulated_N = counts_N.cumsum(0)

    def quantile(percent: int) -> float:
        needed = -(-percent * total // 100)  # rounded up
        return float((int((cumulated_N < needed).sum()) + 1) * bin_tokens)

    return {"mean": int(tokens) / total, "p50": quantile(50), "p95": quantile(95), "cut": int(cut) / total}


class GenerationLength(Callback):
    """Logs completion lengths of reinforcement learning, warns beyond a budget, and can stop the run there.

    The RL module's `training_step` returns, on the steps that generated new rollouts and only there, beside `loss`:
    `completion_lengths` (LongTensor [B]: tokens with the end token), `truncated` (bool [B]: cut off at the cap),
    `effort` and `environment` (lists of B texts), for all B completions that this process generated (not gathered).
    With `completion_ids` (lists of token ids) the share of completions that end in a loop is logged, too.
    All processes generate on the same steps.

    Args:
        child: the child's folder; no drift is logged without it, or (with a warning) if it carries no parent's lengths.
        environments: names of the environments; None: those of the run's `PromptData`.
        budget_tokens: highest allowed mean tokens of a window at each effort; efforts left out have no budget.
        stop_on_budget: end the run (after the current step) when a budget is exceeded, instead of only warning.
        window: rollouts in a window.
        max_tokens: longest completion that the quantiles must tell apart.
        num_bins: bins of the histogram; the bin width is max_tokens / num_bins, rounded up.

    Raises:
        ValueError: unknown efforts, bad sizes, no folder `child`, or no way to know the environments.
    """

    def __init__(
        self,
        child: Path | None = None,
        environments: list[str] | None = None,
        budget_tokens: dict[str, float] | None = None,
        stop_on_budget: bool = False,
        window: int = 4,
        max_tokens: int = 131_072,
        num_bins: int = 4096,
    ) -> None:
        if min(window, max_tokens, num_bins) < 1:
            raise ValueError(f"window {window}, max_tokens {max_tokens}, num_bins {num_bins}: each must be at least 1.")
        budgets = budget_tokens or {}
        if set(budgets) - set(EFFORTS) or any(tokens <= 0 for tokens in budgets.values()):
            raise ValueError(f"budget_tokens {budgets} were given; efforts are {list(EFFORTS)}, budgets are positive.")
        self.parent: dict[str, LengthStatistics] = {} if child is None else _parents_lengths(child)
        self.environments = environments or []
        self.budget_tokens = budgets
        self.stop_on_budget = stop_on_budget
        self.window = window
        self.bin_tokens = -(-max_tokens // num_bins)
        self.num_bins = num_bins
        self._rollouts = 0  # in the unfinished window
        self._sums: dict[str, Tensor] = {}  # of the unfinished window, over all processes; empty: nothing yet
        self._exceeded: list[str] = []  # efforts that were over budget in the last window
        self._values: dict[str, float] = {}  # of the last finished window
        self._loops_known = False  # whether rollouts have token ids
        self._metric: LengthHistogram | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learns the environments' names and makes the histogram."""
        if not self.environments:
            data = trainer.datamodule  # type: ignore[attr-defined]
            if not isinstance(data, PromptData):
                raise ValueError("GenerationLength knows no environments: give it `environments` or use PromptData.")
            self.environments = [environment.name for environment in data.environments]
        self._metric = LengthHistogram(len(EFFORTS) * len(self.environments), self.bin_tokens, self.num_bins)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the step's rollouts, if it had any, and log the last finished window."""
        given = [key for key in ROLLOUT_KEYS if isinstance(outputs, dict) and key in outputs]
        if given:
            if len(given) < len(ROLLOUT_KEYS):
                raise ValueError(f"training_step returned {given}; all of {list(ROLLOUT_KEYS)} are needed, or none.")
            self._add(outputs, pl_module.device)
            if self._rollouts == self.window:
                self._finish_window(trainer)
        if self._values:  # on every step, so that no logging interval misses them
            pl_module.log_dict(self._values, on_step=True, on_epoch=False, rank_zero_only=False)

    def _add(self, outputs: dict[str, Any], device: torch.device) -> None:
        """Add one rollout of all processes to the window."""
        assert self._metric is not None  # made by setup
        unknown = (set(outputs["environment"]) - set(self.environments)) | (set(outputs["effort"]) - set(EFFORTS))
        if unknown:
            raise ValueError(
                f"Completions of {sorted(unknown)} were given; environments are {self.environments}, efforts are "
                f"{list(EFFORTS)}. Name every environment of the prompts."
            )
        pairs = zip(outputs["effort"], outputs["environment"], strict=True)
        groups = [EFFORTS.index(e) * len(self.environments) + self.environments.index(name) for e, name in pairs]
        ids = outputs.get("completion_ids")
        loops = None if ids is None else [is_looping([int(token) for token in row]) for row in ids]
        self._loops_known = ids is not None
        metric = self._metric.to(device)
        metric.update(
            outputs["completion_lengths"].to(device).long(),
            outputs["truncated"].to(device),
            torch.tensor(groups, dtype=torch.int64, device=device),
            None if loops is None else torch.tensor(loops, device=device),
        )
        totals = {name: total.cpu() for name, total in metric.compute().items()}
        metric.reset()
        self._sums = {name: total + self._sums.get(name, 0) for name, total in totals.items()}
        self._rollouts += 1

    def _finish_window(self, trainer: Trainer) -> None:
        self._values = self.statistics()
        self._rollouts, self._sums = 0, {}
        means = {effort: self._values.get(f"length/{effort}/mean", 0.0) for effort in self.budget_tokens}
        exceeded = [effort for effort, mean in means.items() if mean > self.budget_tokens[effort]]
        for effort in exceeded:
            if effort not in self._exceeded:
                rank_zero_warn(
                    f"Completions at {effort} effort have {means[effort]:.1f} tokens on average, over the budget of "
                    f"{self.budget_tokens[effort]:g}. Raise the length reward's weight or the budget."
                )
        self._exceeded = exceeded
        if exceeded and self.stop_on_budget:
            trainer.should_stop = True

    def statistics(self) -> dict[str, float]:
        """Return the metrics of the window so far, by name; groups without completions are left out."""
        values: dict[str, float] = {}
        width = len(self.environments)
        for row, effort in enumerate(EFFORTS):
            prefix = f"length/{effort}"
            groups = {f"{prefix}/{name}": [row * width + column] for column, name in enumerate(self.environments)}
            for key, members in ({prefix: list(range(row * width, (row + 1) * width))} | groups).items():
                values |= self._group_statistics(key, members)
            if effort in self.parent and f"{prefix}/mean" in values:
                values[f"{prefix}/drift"] = values[f"{prefix}/mean"] / self.parent[effort].mean
        if {"length/low/mean", "length/high/mean"} <= set(values):
            values["length/effort_ratio"] = values["length/high/mean"] / values["length/low/mean"]
        return values

    def _group_statistics(self, key: str, members: list[int]) -> dict[str, float]:
        """Statistics of some groups together, as `<key>/mean` and so on; empty without completions."""
        if not self._sums:
            return {}
        counts_N = self._sums["counts_GN"][members].sum(0)
        if int(counts_N.sum()) == 0:
            return {}
        tokens, cut = self._sums["tokens_G"][members].sum(), self._sums["cut_G"][members].sum()
        numbers = histogram_statistics(counts_N, tokens, cut, self.bin_tokens)
        if self._loops_known:
            numbers["looping"] = int(self._sums["looping_G"][members].sum()) / int(counts_N.sum())
        return {f"{key}/{name}": number for name, number in numbers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the unfinished window over all processes (the same on each), and what the last one left."""
        return {
            "environments": list(self.environments),
            "bin_tokens": self.bin_tokens,
            "rollouts": self._rollouts,
            "sums": dict(self._sums),
            "exceeded": list(self._exceeded),
            "values": dict(self._values),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the window of a checkpoint."""
        same = (state_dict["environments"], state_dict["bin_tokens"]) == (self.environments, self.bin_tokens)
        if not same:
            raise ValueError(
                f"The checkpoint's lengths are of environments {state_dict['environments']} in bins of "
                f"{state_dict['bin_tokens']} tokens; this run has {self.environments} and {self.bin_tokens}. "
                "Resume with the settings of the checkpoint or start anew."
            )
        self._rollouts, self._sums = state_dict["rollouts"], dict(state_dict["sums"])
        self._exceeded, self._values = list(state_dict["exceeded"]), dict(state_dict["values"])


def _parents_lengths(child: Path) -> dict[str, LengthStatistics]:
    folder = require_input(child, "child")
    if not (folder / LENGTHS_FILE).is_file():
        rank_zero_warn(
            f"{folder} carries no {LENGTHS_FILE}: how far completions drift from the parent's is not logged. "
            "`lightning run recipes/evaluate.yaml --checkpoint=PARENT` writes that file into its run folder; copy it."
        )
        return {}
    return read_lengths(folder)
