"""The sums of a scoring rule over a parent that is read one layer at a time.

The layers and the scored MoE are those of a parent that is in memory, and so are the bits of the sums; only the order
differs: all batches run through one layer before the next one is read (`lit_puzzle.model.layer_pass`).

Writes, in the folder of the pass, `sums.LAYER` for each layer that is done. A pass that was killed continues with
the layer at which it stopped.

Memory: that of `lit_puzzle.model.memory_budget`, with the chunks of `lit_puzzle.importance.importance` as activations.
Disk: 2 x tokens x channels numbers, and 16 bytes per expert and layer. Shapes: E experts of a layer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_puzzle.importance.expert_scores import ImportanceMethod
from lit_puzzle.importance.footprint import most_chunk_bytes
from lit_puzzle.importance.scored_layers import ScoredMoE, check_finite
from lit_puzzle.model.family import family_of
from lit_puzzle.model.footprint import model_size
from lit_puzzle.model.layer_pass import LayerPass
from lit_puzzle.model.modules import moe_of, set_moe
from lit_puzzle.model.streaming import StreamedModel

FOLDER = "layers"  # of the run folder


def streamed_sums(
    streamed: StreamedModel,
    folder: Path,
    batches: Sequence[Mapping[str, Tensor]],
    counted: Sequence[Tensor],
    method: ImportanceMethod,
    chunk_tokens: int,
) -> list[Tensor]:
    """Return numerator and denominator of every expert, (2, E) for each layer, on the CPU.

    Args:
        streamed: the parent.
        folder: where the states between layers and the sums are kept; the caller removes it.
        batches: `input_ids` and `attention_mask` of all batches of this process.
        counted: which of their tokens are scored, (B, T) each.
        method: the scoring rule.
        chunk_tokens: tokens that a MoE layer evaluates at a time.

    Raises:
        ValueError: the budget is too small for a layer and a batch, or scores are not finite.
    """
    family, most = family_of(streamed.checkpoint.config), max(mask.numel() for mask in counted)
    chunks = most_chunk_bytes(
        model_size(streamed.checkpoint.config), min(chunk_tokens, most), streamed.model.dtype.itemsize
    )
    for at in (whole_pass := LayerPass(streamed, folder, batches, chunks)):
        scored = ScoredMoE(moe_of(at.decoder, family), family, at.layer, method, chunk_tokens)
        set_moe(at.decoder, family, scored)
        try:
            for index, mask_BT in enumerate(counted):
                scored.counted_BT = mask_BT.to(streamed.device)
                at.run(index)
        finally:
            set_moe(at.decoder, family, scored.moe)
        check_finite([scored], "the last layer's pass")
        partial = folder / f"sums.{at.layer}.partial"
        save_file({"sums": scored.sums_2E.cpu()}, partial)
        partial.rename(folder / f"sums.{at.layer}")
    return [load_file(folder / f"sums.{layer}")["sums"] for layer in range(whole_pass.num_layers)]
