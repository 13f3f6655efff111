"""The statistics of keys and values of a model that is read one layer at a time: the counts of the resident pass.

Writes, in the folder of the pass, `statistics` after each layer: the counts of all layers so far. A pass that was
killed resumes at the layer at which it stopped.

Memory: that of `lit_puzzle.model.memory_budget`, with the statistics and 20 bytes for each key or value of one batch as
activations. Disk: 2 x tokens x channels numbers, and the statistics.
Shapes: B rows, T tokens of a row.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_puzzle.kv_cache.footprint import value_bytes
from lit_puzzle.kv_cache.statistics import KVStatistics, recording_layers
from lit_puzzle.model.footprint import model_size
from lit_puzzle.model.layer_pass import LayerPass
from lit_puzzle.model.streaming import StreamedModel

FOLDER = "layers"  # of the run folder, one for each process
FILE = "statistics"


def count_streamed(
    streamed: StreamedModel,
    folder: Path,
    batches: Sequence[Mapping[str, Tensor]],
    counted: Sequence[Tensor],
    statistics: KVStatistics,
) -> None:
    """Add all batches of this process to empty statistics.

    Args:
        streamed: the model.
        folder: where the states between layers and the counts are kept; the caller removes it.
        batches: padded or packed, as `lit_puzzle.model.layer_pass` takes them.
        counted: which of their tokens are counted, (B, T) each.
        statistics: the statistics.

    Raises:
        ValueError: the budget is too small for a layer and a batch, or keys or values are not finite.
    """
    largest = max(mask.numel() for mask in counted)
    values = value_bytes(model_size(streamed.checkpoint.config), largest)
    layers = LayerPass(streamed, folder, batches, values)
    if layers.done:
        statistics.load_state_dict(load_file(folder / FILE))
    else:
        statistics.tokens = sum(int(mask.sum()) for mask in counted)
    for at in layers:
        statistics.amax_LSG[at.layer] = 0
        statistics.counts_LSHM[at.layer] = 0
        for index, mask_BT in enumerate(counted):
            with recording_layers(streamed.model, [at.decoder], statistics, mask_BT.to(streamed.device)):
                at.run(index)
        statistics.check_finite("the last layer's pass")
        save_file(statistics.state_dict(), folder / f"{FILE}.partial")
        (folder / f"{FILE}.partial").rename(folder / FILE)
