"""Plugin for vLLM (0.31 to 0.33), entry point `vllm.general_plugins`: support for `gpt_oss_puzzle`.

Reads and writes nothing. vLLM calls `register` in each of its processes, possibly more than once. The model is imported
only when an engine builds it.

Needs vllm, torch and transformers and no other requirement of this project: install it next to vLLM with --no-deps.
"""

ARCHITECTURE = "GptOssPuzzleForCausalLM"
MODEL = "lit_puzzle.serve.vllm.model:GptOssPuzzleForCausalLM"


def register() -> None:
    """Register configuration, MXFP4 quantization, front-end settings, model, and random weights as a load format."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    import lit_puzzle.model.gpt_oss
    import lit_puzzle.serve.vllm.random_weights  # noqa: F401  (registers the load format)
    from lit_puzzle.serve.vllm.harmony import PuzzleSettings
    from lit_puzzle.serve.vllm.quantization import MXFP4, PuzzleQuantization

    register_quantization_config(MXFP4)(PuzzleQuantization)
    MODELS_CONFIG_MAP[ARCHITECTURE] = PuzzleSettings
    ModelRegistry.register_model(ARCHITECTURE, MODEL)
