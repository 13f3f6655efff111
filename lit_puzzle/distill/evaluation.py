"""Accuracy of a child on held-out problems while it is distilled: before, after, and in validation if wanted.

Reads and writes `before/` and `after/` (episodes) in the run folder. Memory and traffic are those of an evaluation with
gathered weights (`lit_puzzle.evaluate.before_after`). Formulas: `lit_puzzle.evaluate.accuracy`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_puzzle.data.prompts import check_lengths
from lit_puzzle.distill.settings import DistillationEvaluation
from lit_puzzle.environments.answer_formats import fix_format
from lit_puzzle.environments.environment import PromptAtEffort, draw
from lit_puzzle.environments.episodes import Episode
from lit_puzzle.evaluate.accuracy import read_episodes
from lit_puzzle.evaluate.before_after import (
    print_table,
    recovery_results,
    solve_folder,
    solve_together,
    write_evaluation,
)
from lit_puzzle.evaluate.held_out import held_out_problems
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.training.sharding import unsharded

VALIDATION_SEED = 0


class HeldOutEvaluation:
    """Held-out problems, drawn once, and the child's completions of them.

    Args:
        settings: which problems, and how completions are generated.
        trained_efforts: efforts of the documents that are trained on; validation has them unless told otherwise.

    Attributes:
        problems: problems of the evaluation before and after.
        validation_problems: problems of each validation, none of them among `problems`.
    """

    def __init__(self, settings: DistillationEvaluation, trained_efforts: Sequence[str]) -> None:
        self.settings = settings
        environments, efforts = settings.environments, settings.efforts
        self.problems = held_out_problems(environments, efforts, settings.prompts_per_effort, settings.seed)
        questions = {problem.question() for problem, _ in self.problems}
        wanted = settings.validation
        count = wanted.prompts + len(questions) if wanted.prompts else 0
        drawn = draw(environments, efforts[:1], count, VALIDATION_SEED, held_out=True)
        left = [problem for problem, _ in drawn if problem.question() not in questions][: wanted.prompts]
        self.validation_problems: list[PromptAtEffort] = [
            (problem, effort) for effort in wanted.efforts or trained_efforts for problem in left
        ]

    def check(self, tokenizer: PreTrainedTokenizerBase, checkpoint: Path) -> None:
        """Choose the format of completions and render all prompts before anything slow.

        Raises:
            ValueError: one cannot be rendered, or leaves no room for a completion.
        """
        fix_format(tokenizer, self.settings.answer_format)
        check_lengths(tokenizer, self.problems + self.validation_problems, checkpoint, self.settings.max_new_tokens)

    def solve(
        self, pairs: list[PromptAtEffort], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trainer: Trainer
    ) -> list[Episode]:
        """Solve problems greedily, all processes together; leave randomness, modes and gradients as they were."""
        settings = self.settings
        with (
            torch.inference_mode(False),  # validation runs in it; its tensors could not take part in a later backward
            torch.no_grad(),
            unsharded(model),
            trainer.precision_plugin.forward_context(),
        ):
            engine = TransformersEngine(model, tokenizer, settings.batch_size)
            return solve_together(engine, tokenizer, pairs, settings.environments, settings.max_new_tokens)

    def evaluate(
        self,
        folder: Path,
        child: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        trainer: Trainer,
    ) -> None:
        """Write the episodes of `problems`.

        Args:
            folder: to write.
            child: folder of the weights that are measured.
            model: the same weights in memory, which are measured where the settings name no engine.
            tokenizer: of the child.
            trainer: whose processes call this, all of them.
        """
        settings = self.settings
        if settings.engine is not None:
            asked, tokens = settings.environments, settings.max_new_tokens
            episodes = solve_folder(settings.engine, child, tokenizer, self.problems, asked, tokens)
        else:
            episodes = self.solve(self.problems, model, tokenizer, trainer)
        write_evaluation(folder, episodes, trainer.is_global_zero, settings.texts)

    def results(self, run_dir: Path, is_writer: bool) -> dict[str, float]:
        """Return the numbers of `before/` and `after/`, and print them as a table on the writing process."""
        results = recovery_results(read_episodes(run_dir / "before"), read_episodes(run_dir / "after"), [])
        if is_writer:
            print_table(results)
        return results
