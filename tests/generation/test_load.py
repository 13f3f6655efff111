"""Which engine the settings make."""

from pathlib import Path

import pytest
import torch

from lit_puzzle.generation.load import load_engine
from lit_puzzle.generation.sampling import EngineSettings
from lit_puzzle.generation.transformers_engine import TransformersEngine

PARENT = Path(__file__).parents[2] / "lit_puzzle" / "assets" / "tiny_parent"


@pytest.mark.parametrize("name", ["auto", "transformers"])
def test_without_a_gpu_it_is_transformers(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    engine = load_engine(EngineSettings(name, "bfloat16", batch_size=5), PARENT)
    assert isinstance(engine, TransformersEngine)
    assert (engine.batch_size, engine.model.dtype, str(engine.model.device)) == (5, torch.bfloat16, "cpu")


def test_several_gpus_without_vllm_are_refused_before_loading(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("lit_puzzle.generation.load.load_policy", lambda *_: pytest.fail("the model was loaded"))
    for name in ("auto", "transformers"):
        with pytest.raises(ValueError, match="tensor_parallel 2 was given; transformers uses one GPU"):
            load_engine(EngineSettings(name, tensor_parallel=2), PARENT)
