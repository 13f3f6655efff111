"""Writes and shows completions of reinforcement learning with their rewards: a wrong grader or a trick is noticed.

Writes `rollouts/episodes.jsonl` into the run folder, rows of the form of `lit_puzzle.environments.episodes`; `row` is a
running number, `problem` the crc32 of the prompt, `rewards` the value of each reward before weighting. Every
`every_rollouts`-th rollout adds its first `completions`, of the first process; every `show_every_rollouts`-th prints
the first of them on stderr. A resumed run takes out the rows that were written after its training checkpoint, and
writes them again.

Disk: the texts of completions / every_rollouts a rollout.
"""

import sys
import textwrap
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning import Callback, LightningModule, Trainer

from lit_puzzle.data.rl_prompts import PromptData
from lit_puzzle.environments.answer_formats import answer_format
from lit_puzzle.environments.episodes import Episode, Texts, append_rows, cut_rows
from lit_puzzle.environments.grading import Finish, grade
from lit_puzzle.environments.looping import is_looping
from lit_puzzle.run.user_errors import printable

SAMPLES_FILE = Path("rollouts", "episodes.jsonl")
KEYS = ("completion_ids", "prompt", "answer", "truncated", "effort", "environment")
SHOWN_CHARACTERS = 1200  # of a prompt and of a completion: their ends


@runtime_checkable
class WithTokenizer(Protocol):
    """A module with the tokenizer of its policy."""

    tokenizer: Any


class RolloutSamples(Callback):
    """Writes completions of rollouts into `rollouts/episodes.jsonl`, and prints some.

    The RL module's `training_step` returns, on the steps that generated and only there, beside `loss`:
    `completion_ids` (lists of token ids), `prompt`, `answer`, `effort`, `environment` (lists of texts) and `truncated`
    (bool [B]: cut off at the cap), and `rewards` (B numbers by name) if it has any.

    Args:
        every_rollouts: one rollout in so many is sampled, the first one too.
        completions: completions of a sampled rollout.
        show_every_rollouts: one rollout in so many is shown, the first one too; 0: none.

    Raises:
        ValueError: a number below 1 (below 0 of those shown), or data that is not `PromptData`.
    """

    def __init__(self, every_rollouts: int = 10, completions: int = 4, show_every_rollouts: int = 40) -> None:
        if min(every_rollouts, completions) < 1 or show_every_rollouts < 0:
            raise ValueError(
                f"every_rollouts {every_rollouts}, completions {completions}, show_every_rollouts "
                f"{show_every_rollouts}: each must be at least 1, the last one may be 0."
            )
        self.every_rollouts, self.completions = every_rollouts, completions
        self.show_every_rollouts = show_every_rollouts
        self._rollouts = 0
        self._rows = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take out what an attempt wrote after the training checkpoint from which this one continues."""
        if trainer.is_global_zero:
            self._file(trainer).parent.mkdir(exist_ok=True)
            cut_rows(self._file(trainer), self._rows)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the first completions of a rollout, if the step had one and it is sampled."""
        if not isinstance(outputs, dict) or "completion_ids" not in outputs:
            return
        sampled = self._rollouts % self.every_rollouts == 0
        shown = self.show_every_rollouts > 0 and self._rollouts % self.show_every_rollouts == 0
        self._rollouts += 1
        if not sampled and not shown:
            return
        episodes = self._episodes(trainer, pl_module, outputs)
        if shown and trainer.is_global_zero:
            print(shown_text(trainer.global_step, episodes[0]), file=sys.stderr, flush=True)
        if sampled and trainer.is_global_zero:
            append_rows(self._file(trainer), episodes)
        self._rows += len(episodes) if sampled else 0

    def _episodes(self, trainer: Trainer, pl_module: LightningModule, outputs: dict[str, Any]) -> list[Episode]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PromptData) or not isinstance(pl_module, WithTokenizer):
            raise ValueError("RolloutSamples needs PromptData and a module with a tokenizer, as RLRecovery is one.")
        tokenizer: Any = pl_module.tokenizer
        by_name = {environment.name: environment for environment in data.environments}
        columns = {key: list(outputs[key])[: self.completions] for key in KEYS}
        form, rewards = answer_format(tokenizer), outputs.get("rewards", {})
        episodes = []
        for number, ids in enumerate(columns["completion_ids"]):
            prompt, answer, name = (str(columns[key][number]) for key in ("prompt", "answer", "environment"))
            text = str(tokenizer.decode(list(ids), skip_special_tokens=False))
            parsed = form.parse(text)
            finish: Finish = "length" if bool(columns["truncated"][number]) else "stop"
            episode = Episode(
                environment=name,
                effort=str(columns["effort"][number]),
                problem=zlib.crc32(prompt.encode()),
                verdict=replace(
                    grade(by_name[name], parsed, answer, finish),
                    analysis=parsed.analysis is not None if form.thinks else None,
                    looping=is_looping(ids),
                    rewards={name: float(values[number]) for name, values in rewards.items()} or None,
                ),
                generated_tokens=len(ids),
                finish=finish,
                row=self._rows + number,
                texts=Texts(prompt, text, answer),
            )
            episodes.append(episode)
        return episodes

    def _file(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / SAMPLES_FILE

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted so far."""
        return {"rollouts": self._rollouts, "rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self._rollouts, self._rows = state_dict["rollouts"], state_dict["rows"]


def shown_text(update: int, episode: Episode) -> str:
    """Return a completion as it is printed: what was asked, the ends of long texts, rewards and length."""
    texts = episode.texts
    assert texts is not None
    parts = [f"{name} {value:.3g}" for name, value in (episode.verdict.rewards or {}).items()]
    told = [f"{episode.verdict.reason}, {episode.generated_tokens:,} tokens, finish {episode.finish}", *parts]
    lines = [f"--- a completion of update {update}: {episode.environment}, effort {episode.effort} ---"]
    for name, text in (("prompt", texts.prompt), ("completion", texts.completion), ("answer", texts.answer)):
        cut = "... " if len(text) > SHOWN_CHARACTERS else ""
        lines.append(f"{name}:\n{textwrap.indent(printable(cut + text[-SHOWN_CHARACTERS:]), '    ')}")
    return "\n".join([*lines, " | ".join(told)])
