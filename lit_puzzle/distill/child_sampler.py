"""How the child of on-policy distillation samples: by itself, or by vLLM beside it with its newest weights.

Reads and writes nothing. Memory and traffic: `lit_puzzle.generation.transformers_engine`, with the whole child gathered
if `unshard_rollouts`; `lit_puzzle.generation.rollout_engine`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_puzzle.child.trained import trained_tensors
from lit_puzzle.data.hidden_states import release
from lit_puzzle.distill.on_policy_settings import OnPolicySettings
from lit_puzzle.generation.engine import Completion, Engine
from lit_puzzle.generation.mismatch import mismatch_of, sums
from lit_puzzle.generation.rollout_engine import RolloutEngine
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.training.rollouts import call_together, start_engine
from lit_puzzle.training.settings import TrainingSettings
from lit_puzzle.training.sharding import unsharded

LOGPROB_TEMPERATURE = 1.0  # of what vLLM and the child are compared by


class ChildSampler:
    """The child as it samples, on every process.

    Args:
        settings: of rollouts.
        folder: of the child.
        trainer: the run's Trainer.
        training: dtype of the child's weights.
        model: the child's causal language model, inside any LoRA wrapper, as it trains.
        tokenizer: of the child.

    Attributes:
        vllm: the engine; None where the child itself generates.
        sent_bytes: of the weights in the last update of the engine.
    """

    def __init__(
        self,
        settings: OnPolicySettings,
        folder: Path,
        trainer: Trainer,
        training: TrainingSettings,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.settings, self.trainer, self.tokenizer = settings, trainer, tokenizer
        self.vllm: RolloutEngine | None = start_engine(
            settings.rollouts, folder, trainer, training.dtype, LOGPROB_TEMPERATURE
        )
        self.sent_bytes, self._has_folder = 0, False
        self.use(model)

    def use(self, model: PreTrainedModel) -> None:
        """Sample from this model from now on."""
        self.model = model
        if not self.settings.unshard_rollouts:
            model._is_fsdp_managed_module = True  # generation then runs equally many steps on all processes

    def read_folder(self, folder: Path) -> None:
        """Give vLLM the weights of a folder, to stay."""
        assert self.vllm is not None
        engine = self.vllm
        call_together(lambda: engine.read_folder(folder))
        self._has_folder = True

    @contextmanager
    def engine(self, batch_size: int) -> Iterator[Engine]:
        """Make the engine with the child's weights of now; a sharded child is gathered inside, if it fits.

        Args:
            batch_size: completions decoded together by transformers.

        Raises:
            EngineFailedError: vLLM failed on one process; raised on all.
        """
        vllm = self.vllm
        if vllm is not None:
            if not self._has_folder:
                self.sent_bytes = call_together(lambda: vllm.update(trained_tensors(self.model)))
            yield vllm
            return
        gathered = unsharded(self.model) if self.settings.unshard_rollouts else nullcontext()
        with (
            torch.inference_mode(False),  # of validation; its tensors could not take part in a later backward
            torch.no_grad(),
            gathered,
            self.trainer.precision_plugin.forward_context(),
        ):
            yield TransformersEngine(self.model, self.tokenizer, batch_size)
        release(self.model)

    def sample(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> list[Completion]:
        """Return a completion of each prompt; `logprobs` are those of vLLM, if that generates.

        Args:
            prompts: token ids of this process's prompts.
            rows: number of each in the run.

        Raises:
            EngineFailedError: vLLM failed on one process; raised on all.
        """
        sampling = replace(self.settings.sampling, logprobs=self.vllm is not None)
        with self.engine(len(prompts)) as engine:
            if self.vllm is None:
                return engine.generate(prompts, sampling, rows)
            completions: list[Completion] = call_together(lambda: engine.generate(prompts, sampling, rows))
            return completions

    def compare(self, child_N: Tensor, sampled_N: Tensor) -> dict[str, float]:
        """Compare the child's log-probabilities of sampled tokens with vLLM's; every process must call it.

        Args:
            child_N: of the child.
            sampled_N: of the engine.

        Returns:
            `sampling/mismatch` (mean |difference|), `sampling/kl` and `sampling/sync_bytes`.

        Raises:
            EngineFailedError: they differ by more than `rollouts.max_mismatch`.
        """
        assert self.vllm is not None
        own_4 = sums(child_N, sampled_N, torch.ones_like(sampled_N)).cpu()
        found = mismatch_of(torch.stack(self.vllm.ranks.gather(own_4)))
        found.check(self.vllm.settings.mismatch_bound(self.vllm.dtype), self.trainer.global_step + 1)
        return {
            "sampling/mismatch": found.mean,
            "sampling/kl": found.kl,
            "sampling/sync_bytes": float(self.sent_bytes),
        }
