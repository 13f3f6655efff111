"""gpt-oss-120b and the released architecture of its child (arXiv 2602.11937) in vLLM on this card, with random weights.

config.json is all there is: `lit_puzzle.serve.vllm.random_weights` draws MXFP4 experts and the rest on the card, so no
disk is needed and the speed is that of the architecture. vLLM's plain CUDA graphs, FP8 KV cache, one engine after the
other. For each: the KV cache that vLLM made of the memory, and

    read      prompt tokens a second of requests answered with one token
    step      (seconds of all tokens - seconds of an eighth of them) / the tokens between, the same number of requests

beside the cost model's for the same card. Requests are sent at once, their prompts random and never cached. Random
weights choose all experts equally often and answer nothing: lengths and accuracy are not in it.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cost_model import sources
from fp8_kv import interpreter, with_plugin
from part import Options, Row, run

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from streaming import gpt_oss_config

from lit_puzzle.child.child import child_config
from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.gpus import gpus
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.serving import Deployment, parent_blocks
from lit_puzzle.model.layout import layer_blocks
from lit_puzzle.run.files import read_yaml
from lit_puzzle.run.folder import PACKAGE
from lit_puzzle.serve.vllm.measured import EXECUTION, VARIABLES
from lit_puzzle.serve.vllm.turns import RANDOM_WEIGHTS, TurnsEngine
from lit_puzzle.spec import Scenario

RELEASED = PACKAGE / "recipes" / "gpt_oss_120b" / "assemble_released.yaml"
Workload = tuple[int, int, int]  # requests, prompt tokens, generated tokens
READ: Workload = (16, 4096, 1)
REQUESTS: list[Workload] = [(64, 1024, 256), (128, 1024, 256)]
SMALL: tuple[Workload, list[Workload]] = ((2, 48, 1), [(2, 32, 16)])
SHORTER = 8  # times fewer tokens


def configs(small: bool) -> dict[str, dict[str, Any]]:
    """Return config.json of parent and child."""
    parent = gpt_oss_config(2 if small else 36, 4 if small else 128)
    if small:
        del parent["quantization_config"]  # vLLM has no kernel of MXFP4 for CPUs
        parent |= {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
        parent |= {"num_key_value_heads": 2, "head_dim": 32}
        return {"parent": parent, "child": child_config(parent, [(4, 128), (2, 32)])}
    manual = read_yaml(RELEASED)["manual"]
    windows = [manual["windows"].get(layer, window) for layer, (_, window) in enumerate(layer_blocks(parent))]
    blocks = list(zip(manual["experts"], windows, strict=True))
    return {"parent": parent, "child": child_config(parent, blocks)}


def work(options: Options) -> Iterator[Row]:
    """Start one engine after the other and time its workloads."""
    python, cuda = interpreter(), options.device == "cuda"
    read, requests = SMALL if options.small else (READ, REQUESTS)
    works, sizes = [read, *requests], [batch for batch, _, _ in requests]
    longest = max(prompt + generated for _, prompt, generated in works)
    settings: dict[str, Any] = {
        **{"load_format": RANDOM_WEIGHTS, "dtype": "bfloat16", "kv_cache_dtype": "fp8", "skip_tokenizer_init": True},
        **{"enable_prefix_caching": False, "max_model_len": longest + 1, "max_num_seqs": max(read[0], *sizes)},
    }
    settings |= EXECUTION["graphs"]
    if cuda:
        settings["compilation_config"] = settings["compilation_config"] | {"cudagraph_capture_sizes": sizes}
    else:
        settings |= {"kv_cache_memory_bytes": 2**28}
    variables = with_plugin(options.folder) | VARIABLES["graphs"] | ({} if cuda else {"CUDA_VISIBLE_DEVICES": ""})
    for name, config in configs(options.small).items():
        folder = options.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        start = time.monotonic()
        with TurnsEngine(python, folder, settings, options.folder / f"{name}.log", variables) as engine:
            engine.wait_until_ready()
            room = engine.step({"do": "capacity"})
            yield {"model": name, "ready after s": round(time.monotonic() - start, 1)} | room
            seconds = seconds_of(engine, *read)
            row = {"model": name, "requests": read[0], "prompt": read[1]}
            yield row | {"read tokens/s": round(read[0] * read[1] / seconds)}
            for batch, prompt, generated in requests:
                fewer = generated // SHORTER
                few, seconds = (seconds_of(engine, batch, prompt, tokens) for tokens in (fewer, generated))
                row = {"model": name, "requests": batch, "prompt": prompt, "generated": generated}
                row |= {
                    "seconds": round(seconds, 2),
                    "generated tokens/s": round(batch * generated / seconds, 1),
                    "step ms": round(1000 * (seconds - few) / (generated - fewer), 2),
                }
                yield row | predicted(config, batch, prompt, generated)


def seconds_of(engine: TurnsEngine, requests: int, prompt: int, generated: int) -> float:
    """Return the seconds of a round; before it is one with other prompts, for which kernels are compiled."""
    step = {"do": "timed", "requests": requests, "prompt": prompt, "generated": generated}
    engine.step(step | {"seed": 1})
    return float(engine.step(step | {"seed": 2})["wall"])


def predicted(config: dict[str, Any], batch: int, prompt: int, generated: int) -> Row:
    """Return the cost model's step on this card, of every source of kernel times that has such a shape."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    gpu = next((name for name in gpus() if name in card), None)
    if gpu is None:  # a CPU, or a card that the cost model does not know
        return {}
    scenario = Scenario(gpu, 1, prompt, generated, batch)
    found: Row = {}
    for times in sources():
        try:
            costs = CostModel(ModelShape.from_config(config), scenario, times)
        except ValueError:
            continue
        whole = costs.predict(parent_blocks(config), Deployment(1, 1, 1), batch)
        found[f"{times.name}: step ms"] = round(1000 * whole.step_seconds, 3)
    return found


if __name__ == "__main__":
    run(work)
