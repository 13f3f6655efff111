"""What is specific to a family of MoE models, as data: names of tensors, keys of configurations.

Other rooms look it up with `family_of(config)` (a `config.json`) or `family_named(model_type)` (`config.model_type` of
a loaded model). To add a family: an entry in `FAMILIES`, one file in `lit_puzzle/model` with the modeling classes of
its children, and a model class in `lit_puzzle/serve/vllm`; where its layers have other tensors, another router or
another activation, also `lit_puzzle.model.layout` and `lit_puzzle.model.modules`. No other room changes. Does not need
torch. Reads and writes nothing.

Not part of a family, because all have it in common: `model.layers`, `model.embed_tokens`, `model.norm`,
`model.rotary_emb` and `lm_head` of a causal language model in transformers; and `block_configs` of a child's
configuration, one `{"num_local_experts", "sliding_window"}` for each layer.

Source: transformers' `modeling_gpt_oss.py` (names, router, activation), the released gpt-oss checkpoints and
gpt-oss-puzzle-88B (MXFP4 tensors, KV scales), stop tokens of the harmony response format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LayerNames:
    """Names of the parts of a decoder layer, as of its modules so of its tensors.

    Attributes:
        attention_norm: norm before attention.
        attention: attention.
        projections: its linear layers: queries, keys, values, output.
        kv_scales: tensors of the FP8 scales of its keys and of its values.
        moe_norm: norm before the experts.
        moe: router and experts.
        router: the router, which has `weight`, `bias`, `num_experts` and `top_k`.
        experts: the experts, whose parameters stack all experts of the layer along the first dimension.
        expert_matrices: the parameters of `experts` that are matrices. Each has a `*_bias`; in MXFP4 it is stored as
            `*_blocks` and `*_scales`.
    """

    attention_norm: str
    attention: str
    projections: tuple[str, str, str, str]
    kv_scales: tuple[str, str]
    moe_norm: str
    moe: str
    router: str
    experts: str
    expert_matrices: tuple[str, ...]

    @property
    def router_tensors(self) -> tuple[str, ...]:
        """Tensors of the router, one row per expert."""
        return (f"{self.router}.weight", f"{self.router}.bias")

    @property
    def expert_tensors(self) -> tuple[str, ...]:
        """All names that a tensor of the experts can have, in floating point or in MXFP4."""
        kinds = ("", "_bias", "_blocks", "_scales")
        return tuple(f"{self.experts}.{matrix}{kind}" for matrix in self.expert_matrices for kind in kinds)

    @property
    def expert_rows(self) -> frozenset[str]:
        """Tensors of a layer whose first dimension counts experts: what pruning experts selects rows of."""
        return frozenset(self.router_tensors + self.expert_tensors)

    @property
    def attention_half(self) -> tuple[str, str]:
        """Prefixes of the tensors up to the residual sum after attention."""
        return (f"{self.attention_norm}.", f"{self.attention}.")

    @property
    def expert_half(self) -> tuple[str, str]:
        """Prefixes of the other tensors of the layer."""
        return (f"{self.moe_norm}.", f"{self.moe}.")

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Patterns of the parameters of the parts that can be trained alone, by the name of the choice."""
        attention, router = f"*.{self.attention}.*", f"*.{self.router}.*"
        return {"attention": (attention,), "router": (router,), "attention_and_router": (attention, router)}

    @property
    def frozen(self) -> tuple[str, str]:
        """Patterns of the parameters that distillation and reinforcement learning do not train by default."""
        return (f"*.{self.experts}.*", f"*.{self.router}.*")


@dataclass(frozen=True)
class ConfigKeys:
    """Keys of a stock `config.json` that have other names in other families, and defaults for missing keys.

    Attributes:
        num_experts: experts of a layer.
        experts_per_token: experts that the router chooses for a token.
        expert_width: channels inside an expert.
        window: tokens that a windowed layer's attention sees.
        attention_bias: default of the key `attention_bias`.
        layer_types: default of the key `layer_types`, repeated over the layers.
        activation: value of `hidden_act`, which the experts compute whatever it says.
        rope_theta: base of rotary embeddings where the configuration gives none.
        aliases: second names of keys, each with the key that transformers reads.
        constants: keys of numbers inside the layers, with the values where the configuration gives none.
    """

    num_experts: str
    experts_per_token: str
    expert_width: str
    window: str
    attention_bias: bool
    layer_types: tuple[str, ...]
    activation: str
    rope_theta: float
    aliases: tuple[tuple[str, str], ...]
    constants: Mapping[str, float]


@dataclass(frozen=True)
class ChildFormat:
    """How the checkpoint of a child with layers of different sizes is loaded.

    Attributes:
        model_type: of its configuration.
        config_class: class of its configuration, with `from_parent(config, blocks)`.
        model_class: class of its causal language model.
        modeling_file: file that defines both; it is copied into every child's folder and registers them.
    """

    model_type: str
    config_class: str
    model_class: str
    modeling_file: Path

    def config_entries(self) -> dict[str, Any]:
        """Return the entries of a child's `config.json` that tell transformers how to load it."""
        module = self.modeling_file.stem
        classes = {"AutoConfig": self.config_class, "AutoModelForCausalLM": self.model_class}
        return {
            "model_type": self.model_type,
            "architectures": [self.model_class],
            "auto_map": {auto: f"{module}.{name}" for auto, name in classes.items()},
        }


@dataclass(frozen=True)
class Family:
    """A family of MoE models.

    Attributes:
        model_type: of a stock configuration.
        child: format of its children.
        layer: names inside a decoder layer.
        config: keys of a stock configuration.
        vocab_size: size of the vocabulary of the released models, whose stop tokens are known.
        stop_tokens: ids at which generation with that vocabulary must stop.
    """

    model_type: str
    child: ChildFormat
    layer: LayerNames
    config: ConfigKeys
    vocab_size: int
    stop_tokens: tuple[int, ...]


GPT_OSS = Family(
    model_type="gpt_oss",
    child=ChildFormat(
        model_type="gpt_oss_puzzle",
        config_class="GptOssPuzzleConfig",
        model_class="GptOssPuzzleForCausalLM",
        modeling_file=Path(__file__).with_name("gpt_oss.py"),
    ),
    layer=LayerNames(
        attention_norm="input_layernorm",
        attention="self_attn",
        projections=("q_proj", "k_proj", "v_proj", "o_proj"),
        kv_scales=("self_attn.k_scale", "self_attn.v_scale"),
        moe_norm="post_attention_layernorm",
        moe="mlp",
        router="mlp.router",
        experts="mlp.experts",
        expert_matrices=("gate_up_proj", "down_proj"),
    ),
    config=ConfigKeys(
        num_experts="num_local_experts",
        experts_per_token="num_experts_per_tok",
        expert_width="intermediate_size",
        window="sliding_window",
        attention_bias=True,
        layer_types=("sliding_attention", "full_attention"),
        activation="silu",
        rope_theta=150_000.0,
        aliases=(("experts_per_token", "num_experts_per_tok"), ("num_experts", "num_local_experts")),
        constants={"rms_norm_eps": 1e-5, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    ),
    vocab_size=201_088,
    stop_tokens=(200_002, 199_999, 200_012),  # <|return|>, <|endoftext|>, <|call|>
)
FAMILIES = (GPT_OSS,)


def family_named(model_type: object) -> Family:
    """Return the family of a model type, a parent's or a child's.

    Raises:
        ValueError: the model type belongs to no family.
    """
    for family in FAMILIES:
        if model_type in (family.model_type, family.child.model_type):
            return family
    known = [name for family in FAMILIES for name in (family.model_type, family.child.model_type)]
    raise ValueError(f"config.json: model_type {model_type!r} is not supported; allowed: {', '.join(known)}")


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of the model of a `config.json`.

    Raises:
        ValueError: its model type belongs to no family.
    """
    return family_named(config.get("model_type"))


def is_child(config: Mapping[str, Any]) -> bool:
    """Return whether a `config.json` is a child's, with `block_configs`, and not a stock one.

    Raises:
        ValueError: its model type belongs to no family.
    """
    return config.get("model_type") == family_of(config).child.model_type
