"""Train the tiny parent from scratch: a stock GptOssForCausalLM, lessons as data, cross-entropy on labeled tokens.

loss = -1 / N * sum over labeled tokens t of log p(token_t | tokens before t);  N = number of labeled tokens.

Reads nothing. Writes `<run_dir>/model`: a Hugging Face folder in bfloat16 with tokenizer, generation config and
`generation_lengths.json`, measured on held-out problems.
Memory: 16 bytes per parameter (weights, gradients, AdamW) and the activations of one batch of sequences * tokens.
Source: this project's own. Shapes: B sequences of a batch, T tokens, V vocabulary.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import GptOssForCausalLM

from lit_puzzle.environments.environment import EFFORTS, Problem, PromptAtEffort
from lit_puzzle.environments.episodes import Episode
from lit_puzzle.evaluate.held_out import held_out_problems
from lit_puzzle.evaluate.solving import solve_problems
from lit_puzzle.evaluate.summary import split_by_effort, summarize
from lit_puzzle.generation.lengths import length_statistics, write_lengths
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.model.identity import weights_identity
from lit_puzzle.run.inputs import record_output
from lit_puzzle.tiny.lessons import IGNORED, Lessons
from lit_puzzle.tiny.parent import build_parent, save_parent
from lit_puzzle.tiny.settings import Curriculum, Initialization, ParentShape
from lit_puzzle.tiny.tokenizer import build_tokenizer
from lit_puzzle.tiny.world import Family
from lit_puzzle.training.accumulation import batch_weight

Batch = dict[str, Tensor] | list[PromptAtEffort]


class FlatThenCosine(LambdaLR):
    """Learning rate schedule: linear warm-up, constant, then a cosine to 5%.

    Args:
        optimizer: optimizer whose learning rate is scheduled.
        total_steps: step at which the cosine ends.
        warmup_steps: steps of the warm-up.
        flat_share: share of all steps after which the cosine begins.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 20, flat_share: float = 0.4) -> None:
        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            progress = max(step / total_steps - flat_share, 0.0) / (1.0 - flat_share)
            return 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))

        super().__init__(optimizer, factor)


class LessonData(LightningDataModule):
    """Lessons for training and held-out problems for validation.

    Args:
        families: environments that are taught; they take turns.
        curriculum: phases and contents of a batch.
        seed: seed of the lessons.
        held_out_per_effort: number of held-out problems in a validation, the same ones at each effort.
        held_out_seed: seed of the held-out problems.

    Raises:
        ValueError: `families` is empty.
    """

    def __init__(
        self,
        families: list[Family],
        curriculum: Curriculum,
        seed: int = 0,
        held_out_per_effort: int = 48,
        held_out_seed: int = 0,
    ) -> None:
        super().__init__()
        if not families:
            raise ValueError("families is empty; give at least one family of lit_puzzle.tiny.world.")
        self.families = families
        self.curriculum = curriculum
        self.seed = seed
        self.held_out_per_effort = held_out_per_effort
        self.held_out_seed = held_out_seed

    def held_out(self, per_effort: int) -> list[tuple[Problem, str]]:
        """Return held-out problems, the same at each effort, one effort after the other."""
        return held_out_problems(self.families, EFFORTS, per_effort, self.held_out_seed)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the lessons from the trainer's step on, so that a resumed run continues with the next one."""
        assert self.trainer is not None
        first, last = self.trainer.global_step, self.trainer.max_steps
        lessons = Lessons(self.curriculum, self.families, build_tokenizer(), self.seed, first, last)
        return DataLoader(lessons, batch_size=None)

    def val_dataloader(self) -> DataLoader[PromptAtEffort]:
        """Return lists of (held-out problem, effort)."""
        pairs = self.held_out(self.held_out_per_effort)
        return DataLoader(pairs, batch_size=128, collate_fn=list)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move tensors to the device; problems are text and stay unchanged."""
        if isinstance(batch, list):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


class TinyParent(LightningModule):
    """Training of the parent, which is saved and evaluated at the end.

    Args:
        shape: sizes of the model.
        initialization: weights at the start of training.
        optimizer: makes the optimizer; vectors (biases, norms, sinks) have no weight decay.
        lr_scheduler: makes the schedule, which is stepped after every optimizer step.
        sampling: how completions are drawn in validation and in the evaluation at the end.
        measured_per_effort: number of held-out problems at each effort in the evaluation at the end.

    Attributes:
        results: accuracy and generated tokens of the saved parent at each effort.

    Raises:
        ValueError: `measured_per_effort` is below 2.
    """

    def __init__(
        self,
        shape: ParentShape,
        initialization: Initialization,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        sampling: Sampling = Sampling(max_new_tokens=64, temperature=0.0),  # noqa: B008  (frozen)
        measured_per_effort: int = 256,
    ) -> None:
        super().__init__()
        if measured_per_effort < 2:
            raise ValueError(f"measured_per_effort {measured_per_effort} was given; at least 2 are needed.")
        self.shape = shape
        self.initialization = initialization
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.sampling = sampling
        self.measured_per_effort = measured_per_effort
        self.tokenizer = build_tokenizer()
        self.results: dict[str, float] = {}
        self._episodes: list[Episode] = []

    def configure_model(self) -> None:
        """Build the model once; its random weights follow Lightning's seed."""
        if "model" not in self._modules:
            self.model = build_parent(self.shape, self.initialization)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the recipe's optimizer and schedule; vectors have no weight decay."""
        parameters = list(self.model.parameters())
        matrices = {"params": [p for p in parameters if p.ndim >= 2]}
        vectors = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
        optimizer = self.optimizer([matrices, vectors])
        if self.lr_scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.lr_scheduler(optimizer), "interval": "step"}]  # type: ignore[return-value]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch of lessons."""
        logits_BTV = self.model(input_ids=batch["input_ids"], use_cache=False).logits
        loss = next_token_loss(logits_BTV, batch["labels"])
        self.log("loss", loss, prog_bar=True)
        weight = batch_weight(self.trainer, batch_idx)
        return loss if weight == 1 else loss * weight

    def validation_step(self, batch: list[PromptAtEffort], batch_idx: int) -> None:
        """Solve held-out problems."""
        self._episodes += self._solve(self.model, batch)

    def on_validation_epoch_end(self) -> None:
        """Log accuracy and generated tokens at each effort."""
        metrics = summarize(self._episodes)
        names = [f"{what}/{effort}" for what in ("accuracy", "tokens") for effort in EFFORTS]
        self.log_dict({name: metrics[name] for name in names})
        self._episodes.clear()

    def on_train_end(self) -> None:
        """Save the parent in bfloat16 and evaluate the saved weights."""
        if not self.trainer.is_global_zero:
            return
        folder = Path(self.trainer.default_root_dir) / "model"
        parent = copy.deepcopy(self.model).to(torch.bfloat16)
        save_parent(folder, parent)
        record_output(folder.parent, "model", weights_identity(folder))
        episodes = self._solve(parent.float(), self._data().held_out(self.measured_per_effort))
        lengths = {
            effort: length_statistics([episode.generated_tokens for episode in group])
            for effort, group in split_by_effort(episodes).items()
        }
        write_lengths(folder, lengths)
        self.results = summarize(episodes)

    def _solve(self, policy: GptOssForCausalLM, pairs: Sequence[PromptAtEffort]) -> list[Episode]:
        engine = TransformersEngine(policy, self.tokenizer, 128)
        return solve_problems(engine, self.tokenizer, pairs, self._data().families, self.sampling)

    def _data(self) -> LessonData:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, LessonData):
            raise ValueError(f"TinyParent trains on lessons: `data` must be {LessonData.__qualname__}, not {data!r}.")
        return data


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the mean cross-entropy of the labeled tokens, each predicted from those before it."""
    targets_N = labels_BT[:, 1:].flatten()
    return nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), targets_N, ignore_index=IGNORED)
