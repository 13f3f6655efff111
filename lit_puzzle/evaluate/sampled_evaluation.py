"""Held-out problems of a training that samples: before, after and in validation, solved by what samples in training.

Reads and writes `before/` and `after/` (episodes) in the run folder. Memory and traffic: those of the engine.
Formulas: `lit_puzzle.evaluate.accuracy`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lit_puzzle.environments.environment import Environment, PromptAtEffort
from lit_puzzle.environments.episodes import Episode
from lit_puzzle.evaluate.accuracy import read_episodes
from lit_puzzle.evaluate.before_after import (
    EvaluationSettings,
    recovery_results,
    solve_folder,
    solve_together,
    write_evaluation,
)
from lit_puzzle.generation.engine import Engine
from lit_puzzle.generation.lengths import known_lengths


class SampledEvaluation:
    """The problems of a run, and the child's completions of them.

    Args:
        settings: how they are solved.
        environments: where problems come from.
        problems: those before and after.
        max_new_tokens: cap on the tokens of a completion.
    """

    def __init__(
        self,
        settings: EvaluationSettings,
        environments: Sequence[Environment],
        problems: list[PromptAtEffort],
        max_new_tokens: int,
    ) -> None:
        self.settings, self.environments, self.problems = settings, environments, problems
        self.max_new_tokens = max_new_tokens

    def solve(
        self,
        pairs: list[PromptAtEffort],
        engine: AbstractContextManager[Engine],
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[Episode]:
        """Solve problems greedily, all processes together.

        Args:
            pairs: problems and efforts.
            engine: of the weights that train; is entered here.
            tokenizer: of the model.
        """
        with engine as entered:
            return solve_together(entered, tokenizer, pairs, self.environments, self.max_new_tokens)

    def write(
        self,
        folder: Path,
        child: Path,
        engine: AbstractContextManager[Engine],
        tokenizer: PreTrainedTokenizerBase,
        is_writer: bool,
    ) -> None:
        """Solve the problems before and after: by what samples, or by an engine that reads the child's folder.

        Args:
            folder: to write.
            child: folder of the weights that are measured.
            engine: of the same weights; is entered if the settings name no other.
            tokenizer: of the child.
            is_writer: whether this process writes.
        """
        if self.settings.engine is None:
            episodes = self.solve(self.problems, engine, tokenizer)
        else:
            asked, tokens = self.environments, self.max_new_tokens
            episodes = solve_folder(self.settings.engine, child, tokenizer, self.problems, asked, tokens)
        write_evaluation(folder, episodes, is_writer, self.settings.texts)

    def results(self, run_dir: Path, lengths: Path, rewards: Sequence[float] = ()) -> dict[str, float]:
        """Return the numbers of `before/` and `after/`.

        Args:
            run_dir: run folder, which has both.
            lengths: folder that knows the parent's lengths, if any does.
            rewards: of each update that generated.
        """
        before, after = (read_episodes(run_dir / when) for when in ("before", "after"))
        return recovery_results(before, after, list(rewards), known_lengths(lengths))
