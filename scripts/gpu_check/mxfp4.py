"""MXFP4 experts on this device: dequantized as on a CPU to the last bit, and a checkpoint loaded.

Experts of gpt-oss's shape with random blocks and scales around 2^-7; then a small checkpoint of the embedded tiny
parent, its experts rounded to MXFP4, is loaded by `load_model` and compared with the CPU's.
"""

import json
import shutil
from collections.abc import Iterator

import torch
from part import Options, Row, milliseconds, peak_mib, relative_error, run

from lit_puzzle.model.mxfp4 import expert_weight, quantize_experts
from lit_puzzle.run.folder import PACKAGE


def dequantizing(options: Options) -> Row:
    """Compare and time the dequantizing of one layer's first matrix."""
    experts, rows, groups = (2, 64, 3) if options.small else (32, 5760, 90)
    blocks = torch.randint(256, (experts, rows, groups, 16), dtype=torch.uint8)
    scales = torch.randint(117, 124, (experts, rows, groups), dtype=torch.uint8)
    blocks_there, scales_there = blocks.to(options.device), scales.to(options.device)
    last = experts - 1
    there = expert_weight(blocks_there[last:], scales_there[last:]).cpu()
    same = torch.equal(expert_weight(blocks[last:], scales[last:]), there)

    def whole() -> torch.Tensor:
        return expert_weight(blocks_there, scales_there)

    ms = milliseconds(whole, options.device)
    return {"experts": experts, "ms": ms, "gib_per_s": round(blocks.numel() * 4 / 2**30 / ms * 1000, 2)} | {
        "peak_mib": peak_mib(whole, options.device),
        "ok": same,
    }


def loading(options: Options) -> Row:
    """Load an MXFP4 checkpoint to the device and to the CPU, and compare their logits."""
    from safetensors.torch import load_file, save_file

    from lit_puzzle.model.loading import load_model

    parent, folder = PACKAGE / "assets" / "tiny_parent", options.folder / "mxfp4"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(parent, folder, ignore=shutil.ignore_patterns("*.safetensors", "SHA256SUMS", "*.index.json"))
    stored = {}
    for file in parent.glob("*.safetensors"):
        for name, value in load_file(file).items():
            if name.endswith(("gate_up_proj", "down_proj")):
                stored[f"{name}_blocks"], stored[f"{name}_scales"] = quantize_experts(value.float())
            else:
                stored[name] = value.bfloat16()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    ids = torch.randint(3, 100, (2, 50), generator=torch.Generator().manual_seed(0))
    logits = []
    for device in ("cpu", options.device):
        model = load_model(folder, "bfloat16", "sink_attention", device=device)
        with torch.no_grad():
            logits.append(model(ids.to(device)).logits.float().cpu())
    error = relative_error(logits[1], logits[0])
    return {"loaded": "tiny parent", "error of logits against the CPU": error, "ok": error < 0.1}


def work(options: Options) -> Iterator[Row]:
    """Dequantize, then load."""
    yield dequantizing(options)
    yield loading(options)


if __name__ == "__main__":
    run(work)
