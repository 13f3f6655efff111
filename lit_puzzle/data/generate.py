"""Generated data: prompts at a mix of efforts with completions sampled from the parent, as documents to distill from.

Reads the parent's folder and prompts (environments' training problems, or a file); writes `documents/` into the run
folder: a Parquet shard per `shard_size` prompts and, last, `documents.json` (`lit_puzzle.data.document_files`). The
tokens of the completion, end token included, are the targets; one that `max_new_tokens` cut off has no end token.
Source: arXiv 2602.11937 ("data compatible with the parent's distribution is very important"), section 7 of its recipe:
equal parts of high and medium effort.

A token is drawn with random numbers of (seed, number of the prompt, position): documents depend neither on
`shard_size` nor on the engine's batch size. Resumable: the same command begins with the first shard that is missing
and ends with the same files. Other engines and devices round logits differently, so a few draws may differ there.

Memory: see `lit_puzzle.generation.transformers_engine` and `vllm_engine`; + all prompts as text and 80 bytes a token of
one shard. Disk: less than 5 bytes a token + 64 KiB a shard. Traffic: none between processes (there is one).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from lit_puzzle.data.document_files import (
    Document,
    close_folder,
    documents_identity,
    read_note,
    shard_name,
    write_shard,
)
from lit_puzzle.data.prompt_source import PromptSource
from lit_puzzle.data.prompts import check_lengths, choose, encode, prompts_identity
from lit_puzzle.data.provenance import Provenance
from lit_puzzle.environments.answer_formats import answer_format, fix_format
from lit_puzzle.environments.environment import LEVELS, Environment, PromptAtEffort
from lit_puzzle.environments.grading import Ungraded, grade_all
from lit_puzzle.generation.engine import Engine
from lit_puzzle.generation.load import load_engine
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.model.chat import fix_date
from lit_puzzle.model.identity import checkpoint_identity
from lit_puzzle.model.opening import load_tokenizer
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.inputs import claim_inputs, record_output, run_date

DOCUMENTS = "documents"
Keep = Literal["all", "correct"]


def generate(
    run_dir: Path,
    parent: Path,
    prompts: PromptSource,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    engine: EngineSettings = EngineSettings(),  # noqa: B008
    keep: Keep = "all",
    shard_size: int = 1024,
) -> dict[str, float]:
    """Sample completions from the parent and write them as documents.

    Args:
        run_dir: the run's folder; gets `documents/`.
        parent: checkpoint folder.
        prompts: which prompts, and at which efforts.
        sampling: how completions are drawn.
        engine: what runs the parent.
        keep: `all` completions, or only those verified as `correct` (environments only).
        shard_size: prompts of a shard; what a killed run loses at most.

    Returns:
        `documents`, `tokens`, `targets`, `shards`; per effort `prompts/<effort>`, `kept/<effort>`, `tokens/<effort>`
        (mean generated), `finished/<effort>` (share) and, where verified, `accuracy/<effort>` (before `keep`).

    Raises:
        ValueError: missing or malformed input, prompts that leave no room for a completion, or nothing kept.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size {shard_size} was given; 1 or more is needed.")
    if keep == "correct" and prompts.environments is None:
        raise ValueError("keep: correct needs environments, which verify completions; prompts of a file have none.")
    sampling.refuse_logprobs("Generation of documents")
    parent = require_input(parent, "parent checkpoint", "config.json")
    pairs = choose(prompts)
    tokenizer = load_tokenizer(parent)
    fix_date(tokenizer, run_date(run_dir))
    fix_format(tokenizer, prompts.answer_format)
    check_lengths(tokenizer, pairs, parent, sampling.max_new_tokens)
    claim_inputs(run_dir, {"parent": checkpoint_identity(parent), "prompts": prompts_identity(prompts, pairs)})
    provenance = Provenance.of(parent)
    folder = run_dir / DOCUMENTS
    shards = [range(start, min(start + shard_size, len(pairs))) for start in range(0, len(pairs), shard_size)]
    missing = [number for number in range(len(shards)) if not (folder / shard_name(number)).is_file()]
    if missing:  # else an attempt that was killed had made them all
        loaded = load_engine(engine, parent)
        folder.mkdir(exist_ok=True)  # not before: what is refused leaves nothing behind
        for number in missing:
            rows = shards[number]
            share = pairs[rows.start : rows.stop]
            documents = complete(share, rows, loaded, sampling, tokenizer, prompts.environments)
            write_kept(folder, number, documents, keep)
    settings = {name: value for name, value in asdict(sampling).items() if name != "logprobs"} | {"keep": keep}
    record = close_folder(folder, provenance, len(shards), settings)
    if record["documents"] == 0:
        raise ValueError(f"keep: {keep} left none of {len(pairs)} completions of {parent}. Ask more, or keep: all.")
    results = summarize([json.loads(read_note(folder / shard_name(number))) for number in range(len(shards))])
    record_output(run_dir, "documents", documents_identity(folder, len(shards)))
    print_table(results)
    return {key: float(record[key]) for key in ("documents", "tokens", "targets")} | {"shards": len(shards)} | results


def complete(
    pairs: Sequence[PromptAtEffort],
    rows: Sequence[int],
    engine: Engine,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    environments: Sequence[Environment] | None,
) -> list[tuple[Document, bool]]:
    """Return a document for each prompt, verified where there are environments, and whether it ended by itself.

    Args:
        pairs: problems at their efforts.
        rows: number of each among all prompts.
        engine: the parent.
        sampling: how completions are drawn.
        tokenizer: of the parent.
        environments: verify the completions; None: nothing can be verified.
    """
    prompts = encode(tokenizer, pairs)
    form = answer_format(tokenizer)
    documents = []
    completions = list(engine.generate(prompts, sampling, rows))
    grades: list[float | None] = [None] * len(completions)
    if environments is not None:
        texts = [str(tokenizer.decode(completion.token_ids, skip_special_tokens=False)) for completion in completions]
        ungraded = [
            Ungraded(problem.environment, form.parse(text), problem.answer, completion.finish)
            for (problem, _), text, completion in zip(pairs, texts, completions, strict=True)
        ]
        grades = [verdict.correct for verdict in grade_all(environments, ungraded)]
    for (problem, effort), prompt, completion, correct in zip(pairs, prompts, completions, grades, strict=True):
        token_ids = completion.token_ids
        mask = [0] * len(prompt) + [1] * len(token_ids)
        document = Document([*prompt, *token_ids], mask, problem.environment, effort, correct)
        documents.append((document, completion.finish == "stop"))
    return documents


def write_kept(folder: Path, number: int, documents: Sequence[tuple[Document, bool]], keep: Keep) -> None:
    """Write what is kept of one shard, with the sums of all of it as the note."""
    kept = [document for document, _ in documents if keep == "all" or document.correct == 1.0]
    write_shard(folder, number, kept, json.dumps(count(documents, keep)))


def count(documents: Sequence[tuple[Document, bool]], keep: Keep) -> dict[str, dict[str, float]]:
    """Return the sums of one shard per effort; what is not kept counts too."""
    sums: dict[str, dict[str, float]] = {}
    for document, ended in documents:
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
    for effort in (effort for effort in LEVELS if any(effort in shard for shard in shards)):
        rows = [shard[effort] for shard in shards if effort in shard]
        total = {key: sum(row[key] for row in rows) for key in rows[0]}
        results |= {f"prompts/{effort}": total["prompts"], f"kept/{effort}": total["kept"]}
        results |= {f"{key}/{effort}": total[key] / total["prompts"] for key in ("tokens", "finished")}
        if total["verified"]:
            results[f"accuracy/{effort}"] = total["correct"] / total["verified"]
    return results


def print_table(results: Mapping[str, float]) -> None:
    """Print the numbers, an effort a row."""
    table = Table("effort", "prompts", "kept", "tokens", "ended by itself", "accuracy", title="Generated by the parent")
    for effort in (effort for effort in LEVELS if f"prompts/{effort}" in results):
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
