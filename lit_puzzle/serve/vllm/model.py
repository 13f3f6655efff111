"""gpt_oss_puzzle in vLLM: vLLM's gpt-oss with a number of experts and a window for each layer.

vLLM's gpt-oss gives every even layer the same window and all layers the same number of experts; here both come from
`block_configs`. Settings for which vLLM's gpt-oss has constants are refused unless they equal those constants.

Source: vllm/model_executor/models/gpt_oss.py (the same in 0.31 and 0.32), whose classes this derives from.
Loading: `lit_puzzle.serve.vllm.loading`. Memory: of one rank, weights / (TP x PP), experts / (TP or EP) / PP.
"""

from collections.abc import Iterable

from torch import Tensor, nn
from vllm.config import CacheConfig, ParallelConfig, VllmConfig
from vllm.distributed import get_ep_group, get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.gpt_oss import (
    GptOssForCausalLM,
    GptOssModel,
    GptOssRoutedExperts,
    MLPBlock,
    OAIAttention,
    TransformerBlock,
)
from vllm.model_executor.models.utils import maybe_prefix
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from lit_puzzle.generation.vllm_engine import LOGITS_SCALE
from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig
from lit_puzzle.model.layout import layer_blocks
from lit_puzzle.serve.vllm.loading import is_reloading, load_weights
from lit_puzzle.serve.vllm.quantization import PuzzleQuantization, experts_method

CONSTANTS = {
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "hidden_act": "silu",
    "attention_bias": True,
    "tie_word_embeddings": False,
}  # values that vLLM's gpt-oss assumes
YARN = ("rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")


class PuzzleAttention(OAIAttention):
    """Attention with the window of its layer, scales of an FP8 KV cache, and sinks that can be reloaded."""

    def _build_attention(
        self,
        config: GptOssPuzzleConfig,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> Attention:
        set_weight_attrs(self.sinks, {"weight_loader": load_sinks})
        scaled = cache_config is None or cache_config.cache_dtype != "fp8_e5m2"  # its range needs no scales
        return Attention(
            self.num_local_attention_heads,
            self.head_dim,
            self.scaling,
            num_kv_heads=self.num_local_key_value_heads,
            cache_config=cache_config,
            quant_config=(quant_config or PuzzleQuantization()) if scaled else None,
            per_layer_sliding_window=config.block_configs[self.layer_idx]["sliding_window"],
            prefix=f"{prefix}.attn",
            sinks=self.sinks,
        )


def load_sinks(param: nn.Parameter, loaded_weight: Tensor) -> None:
    """Copy the sinks of this rank's heads from those of all heads."""
    heads = param.shape[0]
    param.data.copy_(loaded_weight.narrow(0, get_tensor_model_parallel_rank() * heads, heads))


class PuzzleRoutedExperts(GptOssRoutedExperts):
    """Experts of a layer, packed or not as `experts_method` decides."""

    def _get_quant_method(
        self, prefix: str, quant_config: QuantizationConfig | None, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        return experts_method(prefix, quant_config, moe_config)


class PuzzleMLP(MLPBlock):
    """Router and experts of a layer; a layer with fewer experts than top-k uses all of them."""

    def __init__(self, vllm_config: VllmConfig, layer_idx: int, prefix: str = "") -> None:
        nn.Module.__init__(self)  # not MLPBlock's, which reads the number of the whole model
        config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
        self.is_sequence_parallel = parallel.use_sequence_parallel_moe and vllm_config.lora_config is None
        self.layer_idx = layer_idx
        self.num_experts = config.block_configs[layer_idx]["num_local_experts"]
        self.hidden_size = config.hidden_size
        self.experts_per_token = min(config.num_experts_per_tok, self.num_experts)
        self.router = GateLinear(
            config.hidden_size, self.num_experts, bias=True, prefix=f"{prefix}.router", return_bias=False
        )
        self.experts = FusedMoEFactory(
            num_experts=self.num_experts,
            top_k=self.experts_per_token,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            renormalize=True,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.experts",
            apply_router_weight_on_input=False,
            has_bias=True,
            activation="swigluoai",
            is_sequence_parallel=self.is_sequence_parallel,
            routed_experts_cls=PuzzleRoutedExperts,
        )


class PuzzleBlock(TransformerBlock):
    """Decoder layer whose norms have the epsilon of the configuration, which vLLM's does not read."""

    attention_cls = PuzzleAttention
    mlp_cls = PuzzleMLP

    def __init__(self, vllm_config: VllmConfig, quant_config: QuantizationConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, quant_config, prefix)
        config = vllm_config.model_config.hf_config
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class PuzzleDecoder(GptOssModel):
    """Embedding, decoder layers and final norm."""

    block_cls = PuzzleBlock

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.norm = RMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps)


class GptOssPuzzleForCausalLM(GptOssForCausalLM):
    """Causal language model that vLLM builds for `architectures: [GptOssPuzzleForCausalLM]`."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)  # not that of GptOssForCausalLM, which builds vLLM's decoder
        config = vllm_config.model_config.hf_config
        check_settings(config)
        check_parallel(vllm_config.parallel_config)
        if vllm_config.parallel_config.enable_expert_parallel:
            check_expert_parallel(config, get_ep_group().world_size)
        self.vllm_config = vllm_config
        self.config = config
        self.loaded = False
        self.model = PuzzleDecoder(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        self.logits_processor = LogitsProcessor(config.vocab_size, scale=config.to_dict().get(LOGITS_SCALE, 1.0))
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the tensors of a checkpoint with strict checks, at the start and in reloads.

        Raises:
            ValueError: the tensors are not those of the configuration, or the engine runs and is not being reloaded.
        """
        if self.loaded and not is_reloading(self):
            raise ValueError(
                "Weights of a running engine were given to load_weights. Use llm.collective_rpc("
                '"reload_weights", kwargs={"weights_iterator": pairs}), then llm.reset_prefix_cache().'
            )
        names = load_weights(self, self.config.to_dict(), weights)
        self.loaded = True
        return names


def check_settings(config: GptOssPuzzleConfig) -> None:
    """Refuse settings that vLLM's gpt-oss would silently ignore.

    Raises:
        ValueError: a setting differs from vLLM's constant, or the RoPE is not plain YaRN.
    """
    settings = config.to_dict()
    for name, value in CONSTANTS.items():
        if settings.get(name, value) != value:
            raise ValueError(
                f"config.json: {name} is {settings[name]!r}; vLLM's gpt-oss always computes with {value!r}. Serve "
                "this model with transformers."
            )
    rope = settings["rope_parameters"]
    other = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(name) is not None]
    missing = [name for name in YARN if rope.get(name) is None]
    if rope.get("rope_type") != "yarn" or other or missing:
        raise ValueError(
            f"config.json: rope_parameters is {rope}; vLLM's gpt-oss supports rope_type yarn with "
            f"{', '.join(YARN)} and truncate (missing: {missing or 'none'}; not supported: {other or 'none'})."
        )


def check_parallel(parallel: ParallelConfig) -> None:
    """Refuse parallelism for which vLLM's CPU worker fails later, or crashes, with any gpt-oss (0.31 and 0.32).

    Raises:
        ValueError: pipeline or expert parallelism on a CPU.
    """
    if not current_platform.is_cpu():
        return
    if parallel.pipeline_parallel_size > 1:
        raise ValueError("vLLM's CPU worker does not run pipeline stages. Use --tensor-parallel-size, or a GPU.")
    if parallel.enable_expert_parallel:
        raise ValueError("vLLM's CPU kernel of experts reads all of them. Serve without --enable-expert-parallel.")


def check_expert_parallel(config: GptOssPuzzleConfig, ranks: int) -> None:
    """Check that the number of ranks divides the number of experts of every layer.

    Raises:
        ValueError: some layers cannot be divided; names them.
    """
    counts = [experts for experts, _ in layer_blocks(config.to_dict())]
    uneven = {layer: count for layer, count in enumerate(counts) if count % ranks}
    if uneven:
        raise ValueError(
            f"Expert parallelism over {ranks} ranks needs numbers of experts that {ranks} divides; layer -> experts: "
            f"{uneven}. Serve without --enable-expert-parallel (tensor parallelism splits inside the experts)."
        )
