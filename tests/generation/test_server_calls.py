"""What a rollout server makes of messages, those of a wrong form too."""

from pathlib import Path
from typing import Any

import pytest
from helpers.server_messages import CHILD, GENERATE, LOAD, pair

from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.generation.server_calls import engine_call
from lit_puzzle.generation.vllm_engine import CPU_KV_CACHE_GIB


@pytest.mark.parametrize(
    ("call", "wrong", "said"),
    [
        (["load"], {}, r"it was asked for \['load'\]"),
        ({"call": ["load"]}, {}, r"it was asked for \{'call': \['load'\]\}"),
        (LOAD, {"folder": 3}, "load: folder was 3"),
        (LOAD, {"fingerprint": None}, "load: fingerprint was None"),
        (LOAD, {"dtype": ["float32"]}, r"load: dtype was \['float32'\]"),
        (LOAD, {"temperature": 0}, "load: temperature was 0"),
        (LOAD, {"kv_cache_gib": "1"}, "load: kv_cache_gib was '1'"),
        (LOAD, {"context_tokens": 1.5}, r"load: context_tokens was 1\.5"),
        (GENERATE, {"prompts": "one"}, "generate: prompts was 'one'"),
        (GENERATE, {"prompts": [3]}, r"generate: prompts was \[3\]"),
        (GENERATE, {"prompts": [[1, True]]}, r"generate: prompts was \[\[1, True\]\]"),
        (GENERATE, {"prompts": [[1, -1]]}, r"generate: prompts was \[\[1, -1\]\]"),
        (GENERATE, {"rows": [2**64]}, r"generate: rows was \[18446744073709551616\]"),
        (GENERATE, {"sampling": "greedy"}, "generate: sampling was 'greedy'"),
        (GENERATE, {"sampling": {"max_new_tokens": "8"}}, "sampling: max_new_tokens was '8'"),
        (GENERATE, {"sampling": {"temperature": float("nan")}}, "sampling: temperature was nan"),
        (GENERATE, {"sampling": {"logprobs": 1}}, "sampling: logprobs was 1"),
        ({"call": "read_trained"}, {"bytes": "x" * 10**6}, r"read_trained: bytes was 'x+\.\.\.x+'"),
    ],
)
def test_messages_of_a_wrong_form(call: Any, wrong: dict[str, Any], said: str, tmp_path: Path) -> None:
    """They are refused in one short line, before anything of them is used."""
    _, server = pair()
    with (
        (tmp_path / "weights").open("w+b") as weights,
        pytest.raises(ValueError, match=f"^{said}.*same version") as error,
    ):
        engine_call(server, call | wrong if wrong else call, weights, 0)
    assert len(str(error.value)) < 200


def test_messages_as_runs_send_them(tmp_path: Path) -> None:
    _, server = pair()
    with (tmp_path / "weights").open("w+b") as weights:
        name, settings, folder, options, temperature, tells = engine_call(server, LOAD, weights, 0)
        assert (name, settings, folder) == ("load", EngineSettings("vllm"), CHILD) and temperature == 1.0 and tells
        assert options == {"enforce_eager": True, "kv_cache_memory_bytes": CPU_KV_CACHE_GIB * 2**30}
        sized = engine_call(server, LOAD | {"kv_cache_gib": 1, "context_tokens": 99}, weights, 0)[3]
        assert sized == {"enforce_eager": True, "kv_cache_memory_bytes": 2**30, "max_model_len": 99}
        assert engine_call(server, GENERATE, weights, 0) == ("generate", [[1, 8, 3]], Sampling(8), [0])
