"""Fixtures that every test file shares, and one environment for all tests, whoever starts them.

The model is a real 40k-parameter gpt-oss with seeded random weights, on one thread: bit-exact comparisons need one
order of summation, and many test processes share few cores.
"""

import gc
import os
import tempfile

CALLERS_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
_HUB_CACHE = tempfile.TemporaryDirectory(prefix="lit_puzzle_hub_")  # each test process has its own; removed at its end
FROM_THE_CALLER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "HUGGING_FACE_HUB_TOKEN", "PYTHONWARNINGS")
SET_BY_LIBRARIES = (  # by Lightning, and by accelerate where it meets a process group
    *("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"),
    *("RANK", "LOCAL_WORLD_SIZE"),
)
PREFIXES = ("LOCAL_", "NODE_", "GROUP_", "SLURM_", "TORCHELASTIC_", "JSM_", "HF_", "TRANSFORMERS_", "VLLM_", "WANDB_")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",  # results are compared with those of a CPU
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": _HUB_CACHE.name,
    "COLUMNS": "80",
}
for _name in list(os.environ):  # before any library reads them
    if _name in FROM_THE_CALLER or (_name.startswith(PREFIXES) and _name not in ("VLLM_PYTHON", "VLLM_VENV")):
        del os.environ[_name]
os.environ.update(ENVIRONMENT)

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import GptOssConfig, GptOssForCausalLM

import lit_puzzle.model.sink_attention  # noqa: F401  (registers it)

torch.set_num_threads(1)
# A fork must not collect garbage of the process that it comes from: the destructor of a process group joins threads
# that a fork does not have, and waits for ever.
os.register_at_fork(after_in_child=gc.freeze)
tqdm.monitor_interval = 0  # its thread takes a lock now and then, which a fork would inherit for ever

TINY: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "vocab_size": 128,
    "initializer_range": 0.2,
    "router_aux_loss_coef": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
    "attn_implementation": "eager",
}


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., GptOssConfig]:
    """A factory of tiny stock configurations: `tiny_config()` or with overrides, `tiny_config(sliding_window=16)`.

    4 layers (window 8 on the even ones), hidden 32, 8 experts top-2, 4 heads over 2 KV heads of 8, vocabulary 128.
    """

    def make(**overrides: Any) -> GptOssConfig:
        return GptOssConfig(**{**TINY, **overrides})

    return make


@pytest.fixture(scope="session")
def _tiny_weights(tiny_config: Callable[..., GptOssConfig]) -> GptOssForCausalLM:
    """The one seeded model behind `tiny_model`; no bias, sink or norm is left at its constant initial value."""
    generator = torch.Generator().manual_seed(20260211)
    model = GptOssForCausalLM(tiny_config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre, spread = (1.0, 0.1) if "norm" in name else (0.0, 0.2)
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(autouse=True)
def _gpus_for_vllm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Show the caller's GPUs to the tests of a real vLLM, which may be one for GPUs."""
    if request.node.get_closest_marker("vllm") is not None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        if CALLERS_GPUS is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", CALLERS_GPUS)


@pytest.fixture
def tiny_model(_tiny_weights: GptOssForCausalLM) -> GptOssForCausalLM:
    """A fresh stock `GptOssForCausalLM` in evaluation mode, float32, eager, the same weights every time."""
    return deepcopy(_tiny_weights)


@pytest.fixture(autouse=True)
def no_process_group_stays() -> Iterator[None]:
    """A process that a later test starts would wait in the group of a Trainer in this one, or want its port again."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in SET_BY_LIBRARIES:
        os.environ.pop(name, None)
