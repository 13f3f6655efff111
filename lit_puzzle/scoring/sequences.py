"""The sequences of a scoring run: written once by the first process, mapped by all, the same in a resumed run.

Writes `calibration_tokens/` into the run folder (`lit_puzzle.data.calibration`), and their hash into `inputs.json`.
"""

from pathlib import Path

from lightning.fabric import Fabric

from lit_puzzle.data.calibration import TOKENS_FOLDER, CalibrationData
from lit_puzzle.data.token_rows import RowBatches
from lit_puzzle.run.identity import Identity
from lit_puzzle.run.inputs import claim_inputs


def open_sequences(
    processes: Fabric, run_dir: Path, data: CalibrationData, score_prompts: bool
) -> tuple[RowBatches, list[list[int]]]:
    """Return the batches of all processes and their prompt lengths (0 to score all).

    Args:
        processes: of the run.
        run_dir: its folder.
        data: the sequences; those that the parent generates are generated once, into the run folder.
        score_prompts: whether the tokens of prompts are scored too.

    Raises:
        ValueError: there are fewer than two sequences, or the inputs differ from those the run was started with.
    """
    if processes.is_global_zero:
        data.write_sequences(run_dir, str(processes.device))
    processes.barrier()
    batches = data.read_batches(run_dir)
    lengths = [[0] * len(batch) for batch in batches] if score_prompts else batches.prompt_lengths()
    if len(batches.rows) < 2:
        raise ValueError(
            "one sequence was given; a standard error needs two. Give more: data.init_args.prompts.num_prompts, "
            "documents.tokens, or lines of sequences, whichever the recipe names."
        )
    if processes.is_global_zero:
        tokens = {"tokens": batches.rows.sha256()}
        claim_inputs(run_dir, {"sequences": Identity(str(run_dir / TOKENS_FOLDER), tokens)})
    return batches, lengths
