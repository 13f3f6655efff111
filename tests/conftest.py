"""Fixtures that every test file shares, and one environment for all tests, whoever starts them.

The model is a real 40k-parameter gpt-oss with seeded random weights, on one thread: bit-exact comparisons need one
order of summation, and many test processes share few cores.
"""

import os
import tempfile

CALLERS_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
_HUB_CACHE = tempfile.TemporaryDirectory(prefix="lit_puzzle_hub_")  # each test process has its own; removed at its end
FROM_THE_CALLER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "HUGGING_FACE_HUB_TOKEN", "PYTHONWARNINGS")
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

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

import lit_puzzle.model.sink_attention  # noqa: F401  (registers it)

torch.set_num_threads(1)

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

# Tests of more than four seconds; `bash scripts/test.sh --fast` leaves them out.
SLOW = {
    "child/test_assemble.py": {"test_child_loads_with_transformers_alone"},
    "costs/test_block_timing.py": {"test_script_writes_a_table_that_the_cost_model_reads"},
    "data/test_generate.py": {
        "test_disk_is_as_the_formula_says",
        "test_prompts_of_a_file_are_asked_unless_they_are_held_out",
    },
    "distill/test_blocks_resume.py": {"test_a_killed_run_resumes_bit_for_bit"},
    "distill/test_blocks_sharding.py": {"test_two_processes_equal_one"},
    "distill/test_kd_recipe.py": {"test_devices_alone_shard_the_recipe"},
    "distill/test_kd_resume.py": {"test_a_killed_run_resumes_bit_for_bit"},
    "distill/test_top_logits.py": {"test_two_launched_sharded_processes_agree_with_one"},
    "docs/test_extending.py": {"test_environment", "test_evaluation", "test_importance_score", "test_reward"},
    "docs/test_pages.py": {"test_every_shown_lightning_run_resolves"},
    "evaluate/test_long_context.py": {"test_window_on_the_vital_layer_collapses_the_score"},
    "generation/test_transformers_engine.py": {
        "test_greedy_tokens_of_the_tiny_parent_are_those_of_generate",
        "test_samples_depend_on_neither_batch_nor_order_nor_shard",
    },
    "importance/test_importance.py": {"test_two_sharded_processes_equal_one"},
    "model/test_gpt_oss.py": {"test_the_carried_code_works_without_this_package"},
    "model/test_loading.py": {"test_two_processes_hold_half_of_a_200_million_model_each"},
    "model/test_sink_attention.py": {
        "test_equals_eager_in_blocks_as_they_are",
        "test_memory_is_linear",
        "test_stock_model_in_training",
    },
    "rl/test_module.py": {
        "test_an_older_best_stays_until_no_checkpoint_names_it",
        "test_final_weights_equal_grpo_trainer",
        "test_killed_runs_resume_bit_for_bit",
        "test_killed_runs_validate_alike_and_keep_the_best_weights",
    },
    "rl/test_trl_engine.py": {"test_resumes_bit_for_bit", "test_weights_equal_grpo_trainer"},
    "run/test_kill.py": {"test_a_killed_job_resumes_bit_for_bit"},
    "run/test_kill_documents.py": {"test_killed_and_resumed_documents_and_their_logits"},
    "scoring/test_scoring.py": {"test_two_launched_sharded_processes_agree_with_one"},
    "search/test_mip.py": {
        "test_equals_brute_force",
        "test_first_programs_without_the_candidates_that_matter",
        "test_quality_losses_of_fifteen_decades",
    },
    "serve/test_export.py": {"test_loads_where_lit_puzzle_cannot_be_imported"},
    "serve/test_export_memory.py": {"test_copying_takes_a_buffer_whatever_the_size"},
    "test_readme.py": {"test_quickstart_runs_the_main_job_as_written"},
    "training/test_fabric.py": {"test_the_wait_ends"},
    "training/test_sharding.py": {
        "test_devices_alone_shard_the_recipe",
        "test_two_killed_processes_resume_bit_for_bit",
        "test_two_processes_agree_with_one",
    },
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests."""
    root = Path(__file__).parent
    for item in items:
        if item.name.partition("[")[0] in SLOW.get(item.path.relative_to(root).as_posix(), ()):
            item.add_marker(pytest.mark.slow)


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
