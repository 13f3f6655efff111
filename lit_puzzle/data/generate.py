"""What the parent itself writes: prompts answered at a mix of efforts, as documents to distill from.

Reads the parent's folder and prompts (environments' training problems, or a file); writes `documents/` into the run
folder: a Parquet shard per `shard_size` prompts and, last, `documents.json` (`lit_puzzle.data.document_files`). The
answer's tokens, end token included, are the targets; an answer that is cut off at `max_new_tokens` has no end token.
Source: arXiv 2602.11937 ("data compatible with the parent's distribution is very important"), section 7 of its recipe:
equal parts of high and medium effort.

A shard depends on the seed and its number alone: a run that is killed goes on with the first shard that is missing and
ends with the same files. On another engine, device or batch size the same seed draws other answers.

Memory: see `lit_puzzle.generation.engines` and `vllm_engine`; + all prompts as text and 80 bytes a token of one shard.
Disk: less than 5 bytes a token + 64 KiB a shard. Traffic: none between processes (there is one).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from lit_puzzle.data.document_files import Document, close_folder, read_note, shard_name, write_shard
from lit_puzzle.data.prompts import PromptAtEffort, check_lengths, choose, encode
from lit_puzzle.data.provenance import Provenance
from lit_puzzle.environments.environment import EFFORTS, Environment, effort_weights
from lit_puzzle.generation.engines import EngineName, start_engine
from lit_puzzle.generation.sampling import Answers, Sampling
from lit_puzzle.run.folder import require_input

DOCUMENTS = "documents"
Keep = Literal["all", "correct"]


def generate(
    run_dir: Path,
    parent: Path,
    prompts: Path | None = None,
    environments: list[Environment] | None = None,
    efforts: dict[str, float] | None = None,
    num_prompts: int | None = None,
    max_new_tokens: int = 96,
    temperature: float = 1.0,
    top_p: float = 1.0,
    keep: Keep = "all",
    shard_size: int = 1024,
    batch_size: int = 128,
    engine: EngineName = "auto",
    tensor_parallel: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
) -> dict[str, float]:
    """Lets the parent answer prompts and writes the documents.

    Args:
        run_dir: The run's folder; gets `documents/`.
        parent: Checkpoint folder of the author.
        prompts: JSON lines, Parquet or `datasets` folder of messages; else give environments.
        environments: What to ask instead; they take turns. Training problems only.
        efforts: Weight of each reasoning effort; None: equal parts of all three.
        num_prompts: How many prompts; None: all of `prompts`.
        max_new_tokens: An answer is cut off there.
        temperature: Of sampling; 0 is greedy.
        top_p: Mass of the most likely tokens that are drawn from.
        keep: `all` answers, or only the verified `correct` ones (environments only).
        shard_size: Prompts of a shard; what a killed run loses at most.
        batch_size: Prompts decoded together by transformers.
        engine: `vllm`, `transformers`, or `auto`: vLLM where it is installed and there is a GPU.
        tensor_parallel: GPUs that share the weights, with vLLM.
        dtype: Of the weights.
        seed: Of the prompts, the efforts and the sampling.

    Returns:
        `documents`, `tokens`, `targets`, `shards`; per effort `prompts/<effort>`, `kept/<effort>`, `tokens/<effort>`
        (mean generated), `finished/<effort>` (share) and, where verified, `accuracy/<effort>` (before `keep`).

    Raises:
        ValueError: Missing or malformed input, prompts that leave no room for an answer, or nothing kept.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p)
    if min(shard_size, batch_size, tensor_parallel) < 1:
        raise ValueError(f"shard_size {shard_size}, batch_size {batch_size}, tensor_parallel {tensor_parallel}: min 1.")
    if keep == "correct" and environments is None:
        raise ValueError("keep: correct needs environments, which verify answers; prompts of a file have none.")
    parent = require_input(parent, "parent checkpoint")
    pairs = choose(prompts, environments, effort_weights(efforts or EFFORTS), num_prompts, seed)
    tokenizer = AutoTokenizer.from_pretrained(parent)
    context_tokens = int(AutoConfig.from_pretrained(parent).max_position_embeddings)
    check_lengths(tokenizer, pairs, context_tokens - max_new_tokens)
    folder = run_dir / DOCUMENTS
    shares = [pairs[start : start + shard_size] for start in range(0, len(pairs), shard_size)]
    missing = [number for number in range(len(shares)) if not (folder / shard_name(number)).is_file()]
    if missing:  # else an attempt that was killed had made them all
        answers = start_engine(engine, parent, dtype, sampling, batch_size, tensor_parallel)
        folder.mkdir(exist_ok=True)  # not before: what is refused leaves nothing behind
        for number in missing:
            written = answer(shares[number], tokenizer, environments, answers, shard_seed(seed, number))
            write_answers(folder, number, written, keep)
    settings = {"seed": seed, "temperature": temperature, "top_p": top_p, "keep": keep}
    record = close_folder(folder, Provenance.of(parent), len(shares), settings | {"max_new_tokens": max_new_tokens})
    if record["documents"] == 0:
        raise ValueError(f"keep: {keep} left none of {len(pairs)} answers of {parent}. Ask more, or keep: all.")
    results = summarize([json.loads(read_note(folder / shard_name(number))) for number in range(len(shares))])
    print_table(results)
    return {key: float(record[key]) for key in ("documents", "tokens", "targets")} | {"shards": len(shares)} | results


def write_answers(folder: Path, number: int, written: Sequence[tuple[Document, bool]], keep: Keep) -> None:
    """Writes what is kept of one shard, with the sums of all of it as the note."""
    kept = [document for document, _ in written if keep == "all" or document.correct == 1.0]
    write_shard(folder, number, kept, json.dumps(count(written, keep)))


def shard_seed(seed: int, number: int) -> int:
    """Of the sampling of one shard: 31 bits of the sha256 of seed and number."""
    return int.from_bytes(hashlib.sha256(f"shard {seed} {number}".encode()).digest()[:4], "big") >> 1


def answer(
    pairs: Sequence[PromptAtEffort],
    tokenizer: PreTrainedTokenizerBase,
    environments: Sequence[Environment] | None,
    answers: Answers,
    seed: int,
) -> list[tuple[Document, bool]]:
    """A document for each prompt, verified where there are environments, and whether its answer ended by itself."""
    prompts = encode(tokenizer, pairs)
    order = sorted(range(len(pairs)), key=lambda i: (EFFORTS.index(pairs[i][1]), len(prompts[i]), i))
    answered = dict(zip(order, answers([prompts[i] for i in order], seed), strict=True))
    by_name = {environment.name: environment for environment in environments or []}
    documents = []
    for i, (problem, effort) in enumerate(pairs):
        token_ids, ended = answered[i]
        correct = None
        if environments is not None:
            text = str(tokenizer.decode(token_ids, skip_special_tokens=False))
            correct = by_name[problem.environment].verify(text, problem.answer)
        mask = [0] * len(prompts[i]) + [1] * len(token_ids)
        documents.append((Document([*prompts[i], *token_ids], mask, problem.environment, effort, correct), ended))
    return documents


def count(written: Sequence[tuple[Document, bool]], keep: Keep) -> dict[str, dict[str, float]]:
    """Sums of one shard per effort; what is not kept counts too."""
    sums: dict[str, dict[str, float]] = {}
    for document, ended in written:
        row = sums.setdefault(
            document.effort, dict.fromkeys(("prompts", "kept", "tokens", "finished", "verified", "correct"), 0.0)
        )
        row["prompts"] += 1
        row["kept"] += keep == "all" or document.correct == 1.0
        row["tokens"] += sum(document.loss_mask)
        row["finished"] += ended
        row["verified"] += document.correct is not None
        row["correct"] += document.correct or 0.0
    return sums


def summarize(shards: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Numbers per effort over all shards, flat."""
    results: dict[str, float] = {}
    for effort in (effort for effort in EFFORTS if any(effort in shard for shard in shards)):
        rows = [shard[effort] for shard in shards if effort in shard]
        total = {key: sum(row[key] for row in rows) for key in rows[0]}
        results |= {f"prompts/{effort}": total["prompts"], f"kept/{effort}": total["kept"]}
        results |= {f"{key}/{effort}": total[key] / total["prompts"] for key in ("tokens", "finished")}
        if total["verified"]:
            results[f"accuracy/{effort}"] = total["correct"] / total["verified"]
    return results


def print_table(results: Mapping[str, float]) -> None:
    """Prints the numbers, an effort a row."""
    table = Table("effort", "prompts", "kept", "tokens", "ended by itself", "accuracy", title="Written by the parent")
    for effort in (effort for effort in EFFORTS if f"prompts/{effort}" in results):
        accuracy = f"{results[f'accuracy/{effort}']:.3f}" if f"accuracy/{effort}" in results else "not verified"
        table.add_row(
            effort,
            f"{results[f'prompts/{effort}']:.0f}",
            f"{results[f'kept/{effort}']:.0f}",
            f"{results[f'tokens/{effort}']:.1f}",
            f"{results[f'finished/{effort}']:.3f}",
            accuracy,
        )
    Console().print(table)
