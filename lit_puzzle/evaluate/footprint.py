"""Bytes and arithmetic of `evaluate`: the engine of `lit_puzzle.generation.footprint`, and the episodes.

Pure functions; imports no torch; reads `config.json`.
"""

from __future__ import annotations

from lit_puzzle.generation.footprint import engine_bytes, engine_knobs, engine_name
from lit_puzzle.model.footprint import model_size
from lit_puzzle.model.planned_shape import planned_config
from lit_puzzle.run.footprint import Assumed, Decoding, Device, Footprint, Phase, Work
from lit_puzzle.run.recipe_values import Values

BYTES_OF_A_TOKEN = 50  # of an episode in memory: token ids as Python integers, and its text


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `evaluate`."""
    planned = planned_config(values.path("checkpoint"))
    size, engine, new = model_size(planned.config), values.inside("engine"), values.whole("sampling.max_new_tokens")
    samples = values.whole("held_out.samples_per_prompt")
    problems = values.whole("held_out.prompts_per_effort") * len(values.at("held_out.efforts")) * samples
    prompt = _prompt_tokens(values, assumed)
    held = engine_bytes(size, engine, device, prompt, new, problems)
    episodes = {"episodes": float(BYTES_OF_A_TOKEN * problems * (prompt + new))}
    decoding = Decoding(
        new, engine.whole("batch_size", least=1), engine_name(engine, device), int(engine.get("tensor_parallel", 1))
    )
    dtype = str(engine.at("dtype"))
    return Footprint(
        "evaluate",
        (Phase("completions", held | (episodes if device.kind == "cpu" else {})),),
        host=episodes,
        disk={"episodes": 6.0 * problems * (prompt + new)},
        works=(Work("completions", planned.config, problems, prompt, dtype=dtype, decoding=decoding),),
        knobs=engine_knobs(engine, device),
        notes=(planned.assumed, f"prompts of {prompt:,} tokens", "completions as long as allowed"),
    )


def _prompt_tokens(values: Values, assumed: Assumed) -> int:
    """Return the tokens of the longest prompts that an environment asks for, else what is assumed of prompts."""
    environments = [one for one in values.get("held_out.environments") or () if isinstance(one, dict)]
    asked = [(one.get("init_args") or {}).get("context_tokens") for one in environments]
    return max((tokens for tokens in asked if isinstance(tokens, int)), default=assumed.prompt_tokens)
