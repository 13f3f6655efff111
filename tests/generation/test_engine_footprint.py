"""What vLLM holds beside a model that trains, by hand: its share of a GPU, nothing there while it sleeps."""

from typing import Any

import pytest

from lit_puzzle.footprint.at_hand import asked_device
from lit_puzzle.generation.engine_footprint import EngineBeside, engine_beside
from lit_puzzle.model.footprint import kv_bytes, model_size, stored_bytes
from lit_puzzle.model.planned_shape import PUBLISHED
from lit_puzzle.run.footprint import GIB
from lit_puzzle.run.recipe_values import Values

SIZE = model_size(PUBLISHED["20b"])


def beside(device: str, **rollouts: Any) -> EngineBeside:
    grpo = Values({"rollouts": {"engine": "vllm"} | rollouts}, "model.init_args.grpo")
    found = engine_beside(SIZE, grpo, "bf16-mixed", asked_device(device, 8))
    assert found is not None
    return found


def test_a_model_that_generates_by_itself_has_no_engine() -> None:
    device = asked_device("H100", 8)
    assert engine_beside(SIZE, Values({"rollouts": {"engine": "transformers"}}), "bf16-mixed", device) is None
    assert engine_beside(SIZE, Values({}), "bf16-mixed", device) is None  # recipes without these settings


def test_servers_take_nothing_here() -> None:
    for kind in ("cpu", "H100"):
        rollouts = Values({"rollouts": {"engine": "server"}})
        found = engine_beside(SIZE, rollouts, "bf16-mixed", asked_device(kind, 8))
        assert found == EngineBeside({}, {}, {}, (), (), 1)


def test_a_gpu_gives_its_share_while_generating_and_nothing_while_training() -> None:
    found = beside("H100", gpu_memory_share=0.4)
    assert sum(found.generating.values()) == pytest.approx(0.4 * asked_device("H100", 1).memory_bytes)
    assert found.generating["weights of vLLM"] == stored_bytes(SIZE) and not found.training and not found.refusals
    assert found.host == {"weights of vLLM while it sleeps": stored_bytes(SIZE)}
    assert found.knobs[0].key == "model.init_args.grpo.rollouts.gpu_memory_share"
    assert max(found.knobs[0].values) < 0.4
    shared = beside("H100", gpu_memory_share=0.4, tensor_parallel=2)
    assert shared.generating["weights of vLLM"] == stored_bytes(SIZE) / 2


def test_a_cache_of_a_given_size_replaces_the_share() -> None:
    found = beside("H100", kv_cache_gib=6)
    assert sum(found.generating.values()) == stored_bytes(SIZE) + 6 * GIB and not found.knobs


def test_a_cpu_keeps_the_engine_while_training() -> None:
    found = beside("cpu", dtype="float32")
    assert found.training == found.generating
    assert found.generating["weights of vLLM"] == 4 * SIZE.parameters
    assert found.generating["KV cache of vLLM"] == 4 * GIB


def test_a_share_without_room_for_one_completion_is_refused_with_both_numbers() -> None:
    one = kv_bytes(SIZE, 1, 131072, 2)
    share = (stored_bytes(SIZE) + one) / asked_device("H100", 1).memory_bytes
    assert not beside("H100", gpu_memory_share=share + 1e-4).refusals
    said = beside("H100", gpu_memory_share=round(share - 1e-2, 4)).refusals[0]
    assert f"{stored_bytes(SIZE) / GIB:,.2f} GiB for its weights" in said and "131,072 tokens" in said
    assert not beside("H100", gpu_memory_share=round(share - 1e-2, 4), context_tokens=4096).refusals
