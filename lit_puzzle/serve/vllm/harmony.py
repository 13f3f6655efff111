"""Enable for children what vLLM's front end reserves for `model_type: gpt_oss`: Harmony prompts and parsers.

vLLM renders chats with openai_harmony, parses channels and tool calls with its Harmony parser, and sets the reasoning
parser `openai_gptoss` if the model type is gpt_oss; a child's is gpt_oss_puzzle. Therefore the model type of a child
with the vocabulary of gpt-oss becomes gpt_oss after its configuration is loaded. A child with another vocabulary keeps
the chat template of its folder.

Source: vllm/model_executor/models/config.py (GptOssForCausalLMConfig), vllm/entrypoints/openai (0.31 and 0.32).
"""

from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import GptOssForCausalLMConfig

from lit_puzzle.model.family import GPT_OSS
from lit_puzzle.serve.vllm.quantization import MXFP4


class PuzzleSettings(GptOssForCausalLMConfig):
    """Settings that vLLM adjusts before it builds a model."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Rename the quantization, which vLLM would claim by the model type, and the model type if Harmony applies."""
        config = model_config.hf_config
        packed = config.to_dict().get("quantization_config")
        if packed is not None and packed["quant_method"] == "mxfp4":
            config.quantization_config["quant_method"] = MXFP4
        if config.vocab_size == GPT_OSS.vocab_size:
            config.model_type = GPT_OSS.model_type

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Set the reasoning parser and graph sizes of gpt-oss if Harmony applies."""
        if vllm_config.model_config.hf_config.vocab_size == GPT_OSS.vocab_size:
            GptOssForCausalLMConfig.verify_and_update_config(vllm_config)
