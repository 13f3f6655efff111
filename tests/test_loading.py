"""Loading parents and children: dtype, MXFP4, devices; nothing of the folder's own code runs."""

import pytest
import torch
from released_twin import write_released_twin

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.loading import load_model
from lit_puzzle.model.mxfp4 import expert_weight


def test_mxfp4_experts_come_in_bfloat16_with_each_layers_own_count(tmp_path):
    folder = write_released_twin(tmp_path / "twin")
    model = load_model(folder, "bfloat16", attention="sink_attention")
    checkpoint = Checkpoint(folder)
    for layer, (count, _) in enumerate(checkpoint.blocks):
        experts = model.model.layers[layer].mlp.experts
        assert experts.down_proj.dtype == torch.bfloat16 and len(experts.down_proj) == count
    name = "model.layers.0.mlp.experts.down_proj"
    expected = expert_weight(checkpoint.read(f"{name}_blocks"), checkpoint.read(f"{name}_scales"))
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj, expected)


def test_mxfp4_in_another_dtype_is_refused(tmp_path):
    folder = write_released_twin(tmp_path / "twin")
    with pytest.raises(ValueError, match="de-quantised to bfloat16; dtype is 'float32'"):
        load_model(folder, "float32")


def test_the_folders_own_code_is_not_run(tmp_path):
    folder = write_released_twin(tmp_path / "twin")
    (folder / "gpt_oss.py").write_text("raise RuntimeError('remote code ran')")
    assert load_model(folder, "bfloat16").config.model_type == "gpt_oss_puzzle"
