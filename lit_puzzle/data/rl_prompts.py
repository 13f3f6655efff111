"""Prompts of environments as data: training prompts with their own effort, and held-out problems to validate on.

TRL applies one set of chat template arguments to a whole batch; a mix of efforts therefore needs prompts that are
already text. The training loader is TRL's own (it repeats each prompt for its group of completions): none is here.

Reads and writes nothing. Memory: every training prompt as text, train_prompts * prompt bytes, on each process.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from lit_puzzle.environments.chat_template import render_prompt
from lit_puzzle.environments.environment import Environment, Mixture, Problem, PromptAtEffort, draw, effort_weights
from lit_puzzle.environments.problem_identity import names_of, problems_identity
from lit_puzzle.run.identity import Identity

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class PromptData(LightningDataModule):
    """Training prompts and held-out problems of environments.

    Args:
        environments: where problems come from; they take turns, in a `Mixture` by their weights. Held-out problems of
            a mixture follow its weights, too.
        efforts: weight of each reasoning effort among the training prompts, e.g. ``{medium: 1.0, high: 1.0}``; an
            effort of weight 0 is measured before and after, but neither trained nor validated on.
        train_prompts: number of training prompts.
        held_out_per_effort: number of held-out problems, the same ones at each effort.
        validation_batch_size: problems in one validation batch.
        seed: which training prompts are drawn.
        held_out_seed: which held-out problems are drawn; its own, so that runs of several seeds are validated alike.
        validation_efforts: efforts of validation, which chooses the best weights; None: those that are trained.

    Raises:
        ValueError: no or duplicate environments, a bad effort mix, bad efforts of validation, or bad counts.
    """

    def __init__(
        self,
        environments: list[Environment] | Mixture,
        efforts: dict[str, float],
        train_prompts: int = 1024,
        held_out_per_effort: int = 64,
        validation_batch_size: int = 128,
        seed: int = 0,
        held_out_seed: int = 0,
        validation_efforts: list[str] | None = None,
    ) -> None:
        super().__init__()
        if train_prompts < 1 or held_out_per_effort < 2 or validation_batch_size < 1:
            raise ValueError(
                f"train_prompts {train_prompts}, held_out_per_effort {held_out_per_effort}, validation_batch_size "
                f"{validation_batch_size} were given; at least 1, 2 and 1 are needed."
            )
        names = [environment.name for environment in environments]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"Environments {names} were given; at least one is needed and names must differ.")
        self.environments = environments
        self.efforts = effort_weights(efforts)
        trained = [effort for effort, weight in self.efforts.items() if weight > 0]
        self.validation_efforts = trained if validation_efforts is None else list(effort_weights(validation_efforts))
        self.num_train_prompts = train_prompts
        self.held_out_per_effort = held_out_per_effort
        self.validation_batch_size = validation_batch_size
        self.seed = seed
        self.held_out_seed = held_out_seed
        self._set_aside: frozenset[str] = frozenset()

    def set_aside(self, problems: Iterable[Problem]) -> None:
        """Names the problems of a final measurement: validation, which chooses among weights, then asks others."""
        self._set_aside = frozenset(problem.question() for problem in problems)

    def input_identities(self) -> dict[str, Identity]:
        """Return the identity of the problems of both splits."""
        efforts = list(self.efforts)[:1]
        training = draw(self.environments, self.efforts, self.num_train_prompts, self.seed, held_out=False)
        held_out = draw(self.environments, efforts, self.held_out_per_effort, self.held_out_seed, held_out=True)
        source = names_of(self.environments)
        return {
            "data.training": problems_identity(source, training),
            "data.held_out": problems_identity(source, held_out),
        }

    def training_pairs(self) -> list[PromptAtEffort]:
        """Return the training prompts as problems at their efforts."""
        return draw(self.environments, self.efforts, self.num_train_prompts, self.seed, held_out=False)

    def train_prompts(self, tokenizer: "PreTrainedTokenizerBase") -> "Dataset":
        """Return the training prompts as a dataset of texts with the columns prompt, answer, environment and effort."""
        from datasets import Dataset

        pairs = self.training_pairs()
        return Dataset.from_dict(
            {
                "prompt": [render_prompt(tokenizer, problem, effort) for problem, effort in pairs],
                "answer": [problem.answer for problem, _ in pairs],
                "environment": [problem.environment for problem, _ in pairs],
                "effort": [effort for _, effort in pairs],
            }
        )

    def held_out(self, effort: str) -> list[Problem]:
        """Return the held-out problems of an effort of mix or validation, none of them set aside; the same at each.

        Raises:
            ValueError: an effort outside the mix, or too few held-out problems for these and those set aside.
        """
        if effort not in {*self.efforts, *self.validation_efforts}:
            raise ValueError(f"Effort {effort!r} was asked for; the mix has {list(self.efforts)}.")
        count = self.held_out_per_effort + len(self._set_aside)  # all different, so that enough are left
        pairs = draw(self.environments, [effort], count, self.held_out_seed, held_out=True)
        left = [problem for problem, _ in pairs if problem.question() not in self._set_aside]
        return left[: self.held_out_per_effort]

    def val_dataloader(self) -> DataLoader[PromptAtEffort]:
        """Return lists of (held-out problem, effort), effort after effort: all, for processes share them later."""
        pairs = [(problem, effort) for effort in self.validation_efforts for problem in self.held_out(effort)]
        return DataLoader(pairs, batch_size=self.validation_batch_size, collate_fn=list)  # type: ignore[arg-type]


def prompt_data(data: object) -> PromptData:
    """Return the data of a run of reinforcement learning.

    Raises:
        ValueError: it is of another kind.
    """
    if not isinstance(data, PromptData):
        raise ValueError(
            f"RLRecovery was given data {type(data).__name__}; it needs lit_puzzle.data.rl_prompts.PromptData."
        )
    return data
