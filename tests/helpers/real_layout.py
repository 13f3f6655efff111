"""A small parent in the layout in which gpt-oss-20b is published, with gpt-oss's chat template, and prompts for it.

Published keys of config.json (`rope_scaling` beside `rope_theta`, `experts_per_token`, mxfp4), shards counted from 0
with an index, MXFP4 experts, three stop tokens, folders of other formats beside the weights. Random weights; a
byte-level tokenizer, which any text passes. Written with the libraries, not with our own writer.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow
import torch
import trl
from pyarrow import parquet
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

LAYERS, EXPERTS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4, 8, 64, 32, 4, 2, 16, 288
SPECIAL = [
    *("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>"),
    *("<|message|>", "<|call|>", "<|endofprompt|>"),
]
TEMPLATE = Path(trl.__file__).parent / "chat_templates" / "gptoss.jinja"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and the control tokens of Harmony."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def config(eos: int, pad: int) -> dict[str, Any]:
    yarn = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096}
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": eos,
        "experts_per_token": 2,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": HEADS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "num_local_experts": EXPERTS,
        "output_router_logits": False,
        "pad_token_id": pad,
        "quantization_config": {
            "modules_to_not_convert": [
                *("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": yarn | {"rope_type": "yarn", "truncate": False},
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": VOCAB,
    }


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, spread: float = 0.2, centre: float = 0.0) -> Tensor:
        return (centre + spread * torch.randn(*shape, generator=generator)).bfloat16()

    made = {"model.embed_tokens.weight": normal(VOCAB, HIDDEN), "lm_head.weight": normal(VOCAB, HIDDEN)}
    made["model.norm.weight"] = normal(HIDDEN, spread=0.1, centre=1.0)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"{at}{norm}.weight"] = normal(HIDDEN, spread=0.1, centre=1.0)
        wide, narrow = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        for name, rows, columns in (
            *(("q", wide, HIDDEN), ("k", narrow, HIDDEN), ("v", narrow, HIDDEN), ("o", HIDDEN, wide)),
        ):
            made[f"{at}self_attn.{name}_proj.weight"] = normal(rows, columns)
            made[f"{at}self_attn.{name}_proj.bias"] = normal(rows)
        made[f"{at}self_attn.sinks"] = normal(HEADS)
        made[f"{at}mlp.router.weight"], made[f"{at}mlp.router.bias"] = normal(EXPERTS, HIDDEN), normal(EXPERTS)
        for name, rows, columns in (("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER)):
            shape = (EXPERTS, rows, columns // 32)
            blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
            made[f"{at}mlp.experts.{name}_blocks"] = blocks
            made[f"{at}mlp.experts.{name}_scales"] = torch.randint(
                121, 126, shape, dtype=torch.uint8, generator=generator
            )
            made[f"{at}mlp.experts.{name}_bias"] = normal(EXPERTS, rows)
    return made


def write_parent(folder: Path) -> Path:
    """Write the parent; return its folder."""
    folder.mkdir(parents=True)
    tokenizer, made = make_tokenizer(), tensors()
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.read_text())
    stops = [tokenizer.convert_tokens_to_ids(name) for name in ("<|return|>", "<|endoftext|>", "<|call|>")]
    (folder / "config.json").write_text(json.dumps(config(stops[0], stops[1]), indent=2))
    generation = {"bos_token_id": 256, "do_sample": True, "eos_token_id": stops, "pad_token_id": stops[1]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    names, weight_map = sorted(made), dict[str, str]()
    for number in range(3):
        file = f"model-0000{number}-of-00002.safetensors"
        held = names[number::3]
        save_file({name: made[name] for name in held}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": sum(each.nbytes for each in made.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for other in ("original", "metal"):  # what a full download brings, too
        (folder / other).mkdir()
        (folder / other / "model.bin").write_bytes(b"another format")
    return folder


def write_prompts(folder: Path, count: int = 96) -> None:
    """Write the files that the recipes of gpt-oss name."""
    folder.mkdir()
    names = ("Mia", "Anna", "Sara", "Ben", "Omar")
    asked = [f"{names[n % 5]} has {n} books and buys {n % 7 + 1} more. How many is that?" for n in range(count)]
    rows = [{"messages": [{"role": "user", "content": text}]} for text in asked]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "prompts.parquet")
    math = [{"prompt": f"Compute {text}", "answer": n + n % 7 + 1} for n, text in enumerate(asked)]
    choice = [
        {"prompt": f"Question {n}: is {n} even?\nA) yes\nB) no\nAnswer with a letter.", "answer": "AB"[n % 2]}
        for n in range(count)
    ]
    for name, lines in (("math", math), ("knowledge", choice)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
