"""Settings: which prompts a model continues, and at which reasoning efforts. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from lit_puzzle.environments.answer_formats import FormatChoice
from lit_puzzle.environments.environment import EFFORTS, Environment, Mixture, effort_weights


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from; `lit_puzzle.data.prompts.choose` draws them.

    Args:
        environments: training problems are drawn from them in turns, of a `Mixture` by its weights.
        file: JSON lines, Parquet or `datasets` folder of messages instead.
        efforts: weight of each reasoning effort; None: equal parts of all three; {none: 1} for a model without efforts.
        num_prompts: how many prompts; None: all of `file`.
        seed: of drawing problems, or of the order of `file`, and of the efforts.
        answer_format: of the completions, where they are verified; `auto`: what the tokenizer says.

    Raises:
        ValueError: unknown efforts, bad weights, or no prompts.
    """

    environments: list[Environment] | Mixture | None = None
    file: Path | None = None
    efforts: dict[str, float] | None = None
    num_prompts: int | None = None
    seed: int = 0
    answer_format: FormatChoice = "auto"

    def __post_init__(self) -> None:
        effort_weights(self.efforts or EFFORTS)
        if self.num_prompts is not None and self.num_prompts < 1:
            raise ValueError(f"num_prompts {self.num_prompts} was given; 1 or more is needed.")
