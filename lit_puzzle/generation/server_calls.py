"""What a rollout server does with a run's message: checks all of it, and makes it a call of the engine's process.

    load          folder, fingerprint, dtype, temperature, kv_cache_gib, context_tokens
    generate      prompts, sampling, rows
    read_trained  bytes, which follow
    read_folder   folder, fingerprint

Reads checkpoint folders that the run names; writes nothing but the sent weights, into a file in shared memory.
"""

import os
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lit_puzzle.generation.rollout_engine import engine_options
from lit_puzzle.generation.rollout_settings import RolloutSettings
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.generation.wire import SAME_VERSION, Wire
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.run.strict_json import checked_fields, checked_keys

GPU_SHARE = 0.92  # vLLM's own default, of a GPU that nobody else uses
NUMBERS = 2**64  # beyond all that are meant


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < NUMBERS


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < NUMBERS


def _are_whole(values: Any) -> bool:
    is_list = isinstance(values, list) and set(map(type, values)) <= {int}
    return is_list and (not values or (min(values) >= 0 and max(values) < NUMBERS))


FOLDER: Mapping[str, Callable[[Any], bool]] = {
    "folder": lambda value: isinstance(value, str),
    "fingerprint": lambda value: isinstance(value, str),
}
ARGUMENTS: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {  # of each call, and whether a value is of their form
    "load": {
        **FOLDER,
        "dtype": lambda value: value in ("float32", "bfloat16"),
        "temperature": lambda value: _is_number(value) and value > 0,
        "kv_cache_gib": lambda value: value is None or _is_number(value),
        "context_tokens": lambda value: value is None or _is_whole(value),
    },
    "generate": {
        "prompts": lambda value: isinstance(value, list) and all(map(_are_whole, value)),
        "sampling": lambda value: isinstance(value, Mapping),
        "rows": _are_whole,
    },
    "read_trained": {"bytes": _is_whole},
    "read_folder": FOLDER,
}
SAMPLING: Mapping[str, Callable[[Any], bool]] = {
    "max_new_tokens": _is_whole,
    "temperature": _is_number,
    "top_p": _is_number,
    "seed": _is_whole,
    "logprobs": lambda value: isinstance(value, bool),
}


def engine_call(wire: Wire, call: Any, weights: BinaryIO, gpus: int) -> tuple[Any, ...]:
    """Return the call of an engine's process that a run's message asks for.

    Args:
        wire: from which weights follow.
        call: the message.
        weights: file in shared memory that gets them.
        gpus: how many GPUs the engine has.

    Raises:
        ValueError: another message than those of `ServedEngine`, weights that do not fit into memory, or a folder that
            is not here.
    """
    name = call.get("call") if isinstance(call, Mapping) else None
    if not isinstance(name, str) or name not in ARGUMENTS:
        raise ValueError(f"it was asked for {reprlib.repr(call)}. {SAME_VERSION}")
    values = checked_keys(name, call, ("call", *ARGUMENTS[name]))
    _check_forms(name, values, ARGUMENTS[name])
    if name == "generate":
        sampling = checked_fields(Sampling, values["sampling"])
        _check_forms("sampling", sampling, SAMPLING)
        return name, values["prompts"], Sampling(**sampling), values["rows"]
    if name == "read_trained":
        _check_memory(values["bytes"])
        wire.receive_file(weights, values["bytes"])
        return name, Path(f"/proc/{os.getpid()}/fd/{weights.fileno()}")
    folder = Path(values["folder"])
    _check_folder(folder, values["fingerprint"])
    return (name, folder) if name == "read_folder" else (name, *_loading(folder, values, gpus))


def _check_forms(owner: str, values: Mapping[str, Any], forms: Mapping[str, Callable[[Any], bool]]) -> None:
    for name, value in values.items():
        if name in forms and not forms[name](value):
            raise ValueError(f"{owner}: {name} was {reprlib.repr(value)}. {SAME_VERSION}")


def _check_memory(num_bytes: int) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > memory:
        sent, there = num_bytes / 2**30, memory / 2**30
        raise ValueError(f"it was to get {sent:,.1f} GiB of weights; its machine has {there:,.1f} GiB of memory.")


def _check_folder(folder: Path, expected: str) -> None:
    try:
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"it does not see {folder}. A server reads the run's folders: give both machines one file system, "
                "under the same path."
            )
        if fingerprint(folder) != expected:
            raise ValueError(f"its {folder} is not the run's: the fingerprints differ. Copy it again.")
    except OSError as error:
        raise ValueError(f"it cannot read {folder} ({error.strerror}).") from None


def _loading(folder: Path, values: Mapping[str, Any], gpus: int) -> tuple[Any, ...]:
    sizes = {name: values[name] for name in ("kv_cache_gib", "context_tokens")}
    settings = RolloutSettings("vllm", gpu_memory_share=GPU_SHARE, **sizes)
    options = engine_options(settings, gpus > 0) | ({"enable_sleep_mode": False} if gpus else {})
    wanted = EngineSettings("vllm", values["dtype"], tensor_parallel=max(gpus, 1))
    return wanted, folder, options, float(values["temperature"]), True
