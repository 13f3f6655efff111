"""Accuracy of a child on held-out problems while it is distilled: before, after, and in validation if that is wanted.

Reads and writes `before/` and `after/` (episodes) in the run folder. Memory and traffic are those of an evaluation with
gathered weights (`lit_puzzle.evaluate.before_after`). Formulas: `lit_puzzle.evaluate.accuracy`.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_puzzle.environments.environment import EFFORTS, Environment, PromptAtEffort, draw, effort_weights
from lit_puzzle.evaluate.accuracy import Episode, read_episodes
from lit_puzzle.evaluate.before_after import (
    EvaluationSettings,
    print_table,
    recovery_results,
    solve_together,
    write_evaluation,
)
from lit_puzzle.evaluate.held_out import held_out_problems
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.training.sharding import unsharded

VALIDATION_SEED = 0


@dataclass(frozen=True)
class AccuracySettings:
    """What is asked.

    Args:
        environments: where problems come from; they take turns.
        efforts: reasoning efforts, each asked the same problems.
        measured: the measurement before and after.
        validation_prompts: problems per effort that every validation asks; 0: none. They are never those measured.
    """

    environments: list[Environment]
    efforts: list[str] = field(default_factory=lambda: list(EFFORTS))
    measured: EvaluationSettings = EvaluationSettings(max_new_tokens=96)  # noqa: RUF009  (frozen)
    validation_prompts: int = 0

    def __post_init__(self) -> None:
        effort_weights(self.efforts)
        if self.validation_prompts < 0 or self.measured.max_new_tokens is None:
            raise ValueError(
                f"accuracy.validation_prompts={self.validation_prompts}, measured.max_new_tokens="
                f"{self.measured.max_new_tokens} were given; at least 0, and a number of tokens, are needed."
            )


class HeldOutAccuracy:
    """Asks the problems of the settings, drawn once."""

    def __init__(self, settings: AccuracySettings) -> None:
        self.settings, measured = settings, settings.measured
        environments, efforts = settings.environments, settings.efforts
        self.measured = held_out_problems(environments, efforts, measured.prompts_per_effort, measured.seed)
        texts = {problem.text() for problem, _ in self.measured}
        count = settings.validation_prompts + len(texts) if settings.validation_prompts else 0
        drawn = draw(environments, efforts[:1], count, VALIDATION_SEED, held_out=True)
        left = [problem for problem, _ in drawn if problem.text() not in texts][: settings.validation_prompts]
        self.validated: list[PromptAtEffort] = [(problem, effort) for effort in efforts for problem in left]

    def solve(
        self, pairs: list[PromptAtEffort], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trainer: Trainer
    ) -> list[Episode]:
        """Solve problems greedily, all processes together; leave randomness, modes and gradients as they were."""
        settings = self.settings.measured
        assert settings.max_new_tokens is not None
        with (
            torch.inference_mode(False),  # validation runs in it; its tensors could not take part in a later backward
            torch.no_grad(),
            unsharded(model),
            trainer.precision_plugin.forward_context(),
        ):
            engine = TransformersEngine(model, tokenizer, settings.batch_size)
            return solve_together(engine, tokenizer, pairs, self.settings.environments, settings.max_new_tokens)

    def measure(
        self, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trainer: Trainer
    ) -> None:
        """Write the episodes of the measured problems."""
        write_evaluation(folder, self.solve(self.measured, model, tokenizer, trainer), trainer.is_global_zero)

    def results(self, run_dir: Path, is_writer: bool) -> dict[str, float]:
        """Numbers, and on one process a table, of `before/` and `after/`."""
        results = recovery_results(read_episodes(run_dir / "before"), read_episodes(run_dir / "after"), [])
        if is_writer:
            print_table(results)
        return results
