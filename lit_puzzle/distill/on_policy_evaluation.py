"""Held-out problems of on-policy distillation: before, after and in validation, solved by what samples in training.

Reads and writes `before/` and `after/` (episodes) in the run folder. Memory and traffic: `lit_puzzle.distill.
child_sampler`. Formulas: `lit_puzzle.evaluate.accuracy`.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lit_puzzle.distill.child_sampler import ChildSampler
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
        self, pairs: list[PromptAtEffort], sampler: ChildSampler, tokenizer: PreTrainedTokenizerBase
    ) -> list[Episode]:
        """Solve problems greedily, all processes together; leave randomness, modes and gradients as they were."""
        with sampler.engine(self.settings.batch_size) as engine:
            return solve_together(engine, tokenizer, pairs, self.environments, self.max_new_tokens)

    def write(
        self, folder: Path, child: Path, sampler: ChildSampler, tokenizer: PreTrainedTokenizerBase, is_writer: bool
    ) -> None:
        """Solve the problems before and after: by what samples, or by an engine that reads the child's folder.

        Args:
            folder: to write.
            child: folder of the weights that are measured.
            sampler: has the same weights.
            tokenizer: of the child.
            is_writer: whether this process writes.
        """
        if self.settings.engine is None:
            episodes = self.solve(self.problems, sampler, tokenizer)
        else:
            asked, tokens = self.environments, self.max_new_tokens
            episodes = solve_folder(self.settings.engine, child, tokenizer, self.problems, asked, tokens)
        write_evaluation(folder, episodes, is_writer, self.settings.texts)

    def results(self, run_dir: Path, child: Path) -> dict[str, float]:
        """Return the numbers of `before/` and `after/`, beside the parent's lengths that the child's folder knows."""
        before, after = (read_episodes(run_dir / when) for when in ("before", "after"))
        return recovery_results(before, after, [], known_lengths(child))
