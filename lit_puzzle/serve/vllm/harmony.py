"""Gives children of gpt-oss what vLLM's front end reserves for `model_type: gpt_oss`: Harmony prompts and parsers.

vLLM renders chats by openai_harmony, parses channels and tool calls by its Harmony parser, and sets the reasoning
parser `openai_gptoss` where the model type is gpt_oss; a child's is gpt_oss_puzzle. So a child that has gpt-oss's
vocabulary says gpt_oss once its configuration is loaded. Other vocabularies keep the chat template of their folder.

Source: vllm/model_executor/models/config.py (GptOssForCausalLMConfig), vllm/entrypoints/openai (0.31 and 0.32).
"""

from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import GptOssForCausalLMConfig

from lit_puzzle.serve.vllm.quantization import MXFP4

HARMONY_VOCABULARY = 201_088  # of gpt-oss-20b and gpt-oss-120b, the vocabulary openai_harmony encodes


class PuzzleSettings(GptOssForCausalLMConfig):
    """Settings that vLLM adjusts before a model is built."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Renames the model type where Harmony applies, and first the quantization that vLLM would claim by it."""
        config = model_config.hf_config
        packed = config.to_dict().get("quantization_config")
        if packed is not None and packed["quant_method"] == "mxfp4":
            config.quantization_config["quant_method"] = MXFP4
        if config.vocab_size == HARMONY_VOCABULARY:
            config.model_type = "gpt_oss"

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """The reasoning parser and graph sizes of gpt-oss, where Harmony applies."""
        if vllm_config.model_config.hf_config.vocab_size == HARMONY_VOCABULARY:
            GptOssForCausalLMConfig.verify_and_update_config(vllm_config)
