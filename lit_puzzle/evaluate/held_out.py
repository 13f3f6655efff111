"""Settings: which held-out problems a model is measured on. Imports no torch.

The problems are the same at each effort, so that efforts, and models, can be compared problem by problem. Samples of a
problem follow one another; each is drawn with random numbers of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lit_puzzle.environments.answer_formats import FormatChoice
from lit_puzzle.environments.environment import EFFORTS, Environment, PromptAtEffort, draw, effort_weights


@dataclass(frozen=True)
class HeldOut:
    """Held-out problems.

    Args:
        environments: where problems come from; they take turns.
        efforts: reasoning efforts; the problems of each are the same. [none] for a model without efforts.
        prompts_per_effort: problems at each effort.
        seed: which problems.
        texts: whether the file of episodes holds prompts, completions and right answers.
        samples_per_prompt: completions of each problem at each effort.
        answer_format: of the completions; `auto`: what the tokenizer says.
        block_size: completions that are finished and saved together; what a killed evaluation loses at most.

    Raises:
        ValueError: unknown efforts, fewer than two problems (no standard error exists), no sample of each, or an empty
            block.
    """

    environments: list[Environment]
    efforts: list[str] = field(default_factory=lambda: list(EFFORTS))
    prompts_per_effort: int = 256
    seed: int = 0
    texts: bool = True
    samples_per_prompt: int = 1
    answer_format: FormatChoice = "auto"
    block_size: int = 1024

    def __post_init__(self) -> None:
        effort_weights(self.efforts)
        if self.prompts_per_effort < 2:
            raise ValueError(f"prompts_per_effort {self.prompts_per_effort} was given; 2 or more are needed.")
        if self.samples_per_prompt < 1:
            raise ValueError(f"samples_per_prompt {self.samples_per_prompt} was given; 1 or more is needed.")
        if self.block_size < 1:
            raise ValueError(f"block_size {self.block_size} was given; 1 or more is needed.")

    def problems(self) -> list[PromptAtEffort]:
        """Return the problems, one effort after the other, each as often as it is sampled."""
        problems = held_out_problems(self.environments, self.efforts, self.prompts_per_effort, self.seed)
        return [problem for problem in problems for _ in range(self.samples_per_prompt)]


def held_out_problems(
    environments: Sequence[Environment], efforts: Sequence[str], prompts_per_effort: int, seed: int
) -> list[PromptAtEffort]:
    """Return the same held-out problems at each effort, one effort after the other."""
    return [
        pair for effort in efforts for pair in draw(environments, [effort], prompts_per_effort, seed, held_out=True)
    ]
