"""Settings of distillation, as recipes hold them: the loss, the evaluation, and which blocks train. Imports no torch.

Reads and writes nothing. Source: arXiv 2411.19146 (losses, blockwise local distillation), arXiv 2306.13649 (generalized
JSD), arXiv 2602.11937 (accuracy at each reasoning effort).
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from lit_puzzle.environments.answer_formats import FormatChoice
from lit_puzzle.environments.environment import EFFORTS, Environment, effort_weights
from lit_puzzle.generation.sampling import EngineSettings
from lit_puzzle.training.settings import TrainingSettings

DivergenceName = Literal["forward_kl", "reverse_kl", "kl_mix", "jsd"]
SubBlocks = Literal["apart", "together"]


@dataclass(frozen=True)
class LossSettings:
    """The terms of the loss of global distillation and their weights; formulas in `lit_puzzle.distill.losses`.

    Args:
        divergence: divergence of the distributions of child and parent.
        beta: weight of forward KL in `kl_mix`, of the parent in the mixture of `jsd`.
        temperature: divides both models' logits.
        logits: weight of the divergence.
        hidden: weight of the distance of hidden states.
        layer_weights: weight of each layer in that distance; default: 1 / layers each.
        lm: weight of the language-model loss on the documents themselves.
        chunk_tokens: number of targets whose logits are computed at a time.

    Raises:
        ValueError: another divergence, weights that are negative, not finite or all zero, or numbers out of range.
    """

    divergence: DivergenceName = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    logits: float = 1.0
    hidden: float = 0.0
    layer_weights: list[float] | None = None
    lm: float = 0.0
    chunk_tokens: int = 256

    def __post_init__(self) -> None:
        if self.divergence not in get_args(DivergenceName):
            raise ValueError(f"loss.divergence is {self.divergence!r}; allowed: {list(get_args(DivergenceName))}.")
        weights = [self.logits, self.hidden, self.lm, *(self.layer_weights or [])]
        if not all(0 <= weight < math.inf for weight in weights) or self.logits + self.hidden + self.lm <= 0:
            raise ValueError(
                f"loss.logits={self.logits}, hidden={self.hidden}, lm={self.lm}, layer_weights={self.layer_weights} "
                "were given; weights are finite and not negative, and one of the first three is positive."
            )
        if not 0 < self.temperature < math.inf or not 0 < self.beta < 1 or self.chunk_tokens < 1:
            raise ValueError(
                f"loss.temperature={self.temperature}, beta={self.beta}, chunk_tokens={self.chunk_tokens} were given; "
                "temperature > 0, 0 < beta < 1 and chunk_tokens >= 1 are needed (beta 0 and 1 are the two KLs)."
            )

    def weight_of_layers(self, layers: int) -> list[float]:
        """Return the weight of each layer in the distance of hidden states.

        Raises:
            ValueError: `layer_weights` of another number of layers.
        """
        weights = self.layer_weights or [1 / layers] * layers
        if len(weights) != layers:
            raise ValueError(f"loss.layer_weights has {len(weights)} entries, the models have {layers} layers.")
        return weights

    def check_top_k(self) -> None:
        """Check that the parent's top-k logits are enough to compute the loss.

        Raises:
            ValueError: terms that need hidden states or another temperature.
        """
        if self.hidden > 0 or self.temperature != 1:
            raise ValueError(
                f"loss.hidden={self.hidden}, temperature={self.temperature} were given, but the parent's top-k logits "
                "contain no hidden states and no other temperatures: set 0 and 1, or give a checkpoint as `parent`."
            )


@dataclass(frozen=True)
class ValidationProblems:
    """Problems whose accuracy is measured in each validation; none of them is among those before and after.

    Args:
        prompts: problems per effort; 0: none.
        efforts: their efforts; None: those of the documents that are trained on.

    Raises:
        ValueError: unknown efforts, or a negative number.
    """

    prompts: int = 0
    efforts: list[str] | None = None

    def __post_init__(self) -> None:
        if self.efforts is not None:
            effort_weights(self.efforts)
        if self.prompts < 0:
            raise ValueError(f"evaluation.validation.prompts={self.prompts} was given; at least 0 is needed.")


@dataclass(frozen=True)
class DistillationEvaluation:
    """Accuracy on held-out problems before and after distillation, and in validation if wanted.

    Args:
        environments: where problems come from; they take turns.
        efforts: reasoning efforts; each gets the same problems.
        prompts_per_effort: problems per effort before and after training, the same ones.
        max_new_tokens: cap on the tokens of a completion.
        batch_size: prompts generated together on one process.
        seed: which problems are evaluated before and after.
        validation: problems whose accuracy is measured in each validation.
        texts: whether the files of episodes hold prompts, completions and right answers.
        answer_format: of completions; `auto`: what the tokenizer says.
        engine: what measures before and after, from the folders, in processes of its own, while those of training
            wait; None: the trained model in memory, on all processes, by transformers. Validation does not use it.

    Raises:
        ValueError: unknown efforts, or numbers out of range.
    """

    environments: list[Environment]
    efforts: list[str] = field(default_factory=lambda: list(EFFORTS))
    prompts_per_effort: int = 256
    max_new_tokens: int = 96
    batch_size: int = 128
    seed: int = 1
    validation: ValidationProblems = ValidationProblems()
    texts: bool = True
    answer_format: FormatChoice = "auto"
    engine: EngineSettings | None = None

    def __post_init__(self) -> None:
        effort_weights(self.efforts)
        if self.engine is not None:
            self.engine.refuse_server("evaluation.engine")
        if self.prompts_per_effort < 2 or min(self.max_new_tokens, self.batch_size) < 1:
            raise ValueError(
                f"evaluation.prompts_per_effort={self.prompts_per_effort}, max_new_tokens={self.max_new_tokens}, "
                f"batch_size={self.batch_size} were given; at least 2, 1 and 1 are needed."
            )


@dataclass(frozen=True)
class BlockTrainingSettings:
    """Which blocks of a library train, which of their tensors, and how the parent is loaded and computed.

    Args:
        layers: only candidates of these layers; default: all.
        sub_blocks: `apart` trains expert halves and attention halves, whose scores the search adds; `together` trains
            every candidate as a whole (score it with pairs).
        tensors: patterns of the tensors that train, by their names inside a layer; default: the router of a block with
            fewer experts, the attention of a block with a window.
        dtype: dtype of the parent; what trains is kept in float32 and rounded to it when used.
        attention: implementation of attention.
        experts: implementation of the experts.

    Raises:
        ValueError: another value of `sub_blocks`.
    """

    layers: list[int] | None = None
    sub_blocks: SubBlocks = "apart"
    tensors: list[str] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: str = "sink_attention"
    experts: str = "grouped_mm"

    def __post_init__(self) -> None:
        if self.sub_blocks not in get_args(SubBlocks):
            raise ValueError(f"training.sub_blocks is {self.sub_blocks!r}; allowed: {list(get_args(SubBlocks))}.")


def check_no_head_adapter(training: TrainingSettings) -> None:
    """Check that no adapter is on the head, whose weight the loss reads chunk by chunk: it would not be trained.

    Raises:
        ValueError: one is.
    """
    targets = [] if training.lora is None else training.lora.target_modules + training.lora.target_parameters
    found = [target for target in targets if "lm_head" in target.split(".")]
    if found:
        raise ValueError(
            f"training.lora: distillation trains no adapter on the head ({found[0]!r}); leave it out, or train all of "
            "its weights without lora."
        )
