"""The model card of an exported folder: README.md with the front matter of the Hugging Face hub.

Describes layers, training, evaluation, serving and limits. Every number comes from the folder itself or from the
run.json of a run that the recipe names.

Reads run.json files. Writes nothing; returns the text of the card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_puzzle.environments.environment import LEVELS
from lit_puzzle.model.family import Family
from lit_puzzle.run.files import read_json
from lit_puzzle.run.folder import RECORD, require_input
from lit_puzzle.serve.configs import Blocks
from lit_puzzle.serve.experts import Rounding
from lit_puzzle.serve.hub import REPOSITORY
from lit_puzzle.serve.settings import Card, Format

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

PICTURE = "plan.png"
ERROR = "_se"  # suffix of standard errors
OWN = "of these weights"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the folder, and which weights it has.

    Attributes:
        parameters: number of parameters.
        weight_bytes: bytes of all tensors.
        context_tokens: longest context.
        fingerprint: `lit_puzzle.model.checkpoint.fingerprint` of the weights.
        source_fingerprint: fingerprint of the checkpoint that was exported.
    """

    parameters: int
    weight_bytes: int
    context_tokens: int
    fingerprint: str
    source_fingerprint: str


@dataclass(frozen=True)
class Facts:
    """What the card says of the folder.

    Attributes:
        format: `puzzle`, `stock` or `masked`.
        family: family of the model.
        blocks: number of experts and window of every layer.
        parent_experts: number of experts in a layer before pruning; None without plan.json.
        packed: layers with MXFP4 experts.
        kv_layers: layers with KV scales.
        scales_from: where the KV scales come from.
        stop_tokens: tokens that end a completion.
        rounding: experts that were copied from an MXFP4 parent or rounded to MXFP4.
        sizes: sizes of the folder.
    """

    format: Format
    family: Family
    blocks: Blocks
    parent_experts: int | None
    packed: frozenset[int]
    kv_layers: frozenset[int]
    scales_from: str
    stop_tokens: Sequence[int]
    rounding: Rounding
    sizes: Sizes


def read_run(path: Path) -> dict[str, Any]:
    """Return the run.json of a finished run.

    Args:
        path: a run folder, or a run.json.

    Raises:
        ValueError: it is missing, of an unfinished run, or without results.
    """
    found = require_input(path, "run for the model card")
    record = read_json(found / RECORD if found.is_dir() else found)
    if not isinstance(record.get("results"), Mapping):
        raise ValueError(f"{path}: {RECORD} has no results; name a run folder of `lightning run`")
    return record


def card_text(card: Card, facts: Facts) -> str:
    """Return the text of the card."""
    sections = [_front_matter(card, facts), f"# {card.name}", _opening(card, facts), *_plan(facts)]
    sections += (
        _training(card.training or [])
        + _evaluation(card.evaluations, facts.sizes)
        + _serving(facts)
        + _limits(card, facts)
    )
    return "\n\n".join(sections) + "\n"


def _front_matter(card: Card, facts: Facts) -> str:
    """Return the metadata of the hub; results are those of evaluations of these very weights."""
    from huggingface_hub import ModelCardData  # half a second

    model_type = facts.family.child.model_type if facts.format == "puzzle" else facts.family.model_type
    results = [
        result
        for title, path in card.evaluations.items()
        for record in [read_run(path)]
        if _whose(record, facts.sizes).startswith(OWN)
        for result in _hub_results(title, record["results"])
    ]
    front = ModelCardData(
        license=card.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=card.parent if REPOSITORY.fullmatch(card.parent) else None,
        tags=[model_type, "mixture-of-experts", "pruned", *(["mxfp4"] if facts.packed else [])],
        model_name=card.name if results else None,
        eval_results=results or None,
    )
    return f"---\n{front.to_yaml()}\n---"


def _hub_results(title: str, results: Mapping[str, Any]) -> list[EvalResult]:
    """Return accuracy and mean generated tokens of each effort in the form of the hub's `model-index`."""
    from huggingface_hub import EvalResult

    metrics = {"accuracy": "accuracy", "tokens": "mean generated tokens"}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name=f"{title}, {effort} effort",
            metric_type=key,
            metric_name=name,
            metric_value=float(results[f"{key}/{effort}"]),
        )
        for effort in LEVELS
        for key, name in metrics.items()
        if f"{key}/{effort}" in results
    ]


def _opening(card: Card, facts: Facts) -> str:
    return (
        f"A pruned Mixture-of-Experts reasoning model: layers of {card.parent} with fewer experts, and windowed "
        f"attention in place of full attention in some of them. {facts.sizes.parameters:,} parameters, "
        f"{facts.sizes.weight_bytes:,} bytes of weights, {facts.sizes.context_tokens:,} tokens of context. Made with "
        "lit_puzzle by the Puzzle method (arXiv 2411.19146 and 2602.11937). License: that of the parent, "
        f"{card.license}."
    )


def _plan(facts: Facts) -> list[str]:
    rows = ["| layer | experts | window | experts stored as | KV scales |", "|---|---|---|---|---|"]
    for layer, (experts, window) in enumerate(facts.blocks):
        count = f"{experts} of {facts.parent_experts}" if facts.parent_experts else f"{experts}"
        stored = "MXFP4" if layer in facts.packed else "floating point"
        scaled = "yes" if layer in facts.kv_layers else "no"
        rows.append(f"| {layer} | {count} | {'full attention' if window is None else window} | {stored} | {scaled} |")
    return ["## Layers", f"![Experts and attention of every layer]({PICTURE})", "\n".join(rows)]


def _training(runs: Sequence[Path]) -> list[str]:
    if not runs:
        return ["## Training", "No training run has led to these weights, as far as the run folders say."]
    sections = ["## Training"]
    for path in runs:
        record = read_run(path)
        sections += [_how(record), numbers({"result": record["results"]})]
    return sections


def _evaluation(runs: Mapping[str, Path], sizes: Sizes) -> list[str]:
    if not runs:
        return ["## Evaluation", "No evaluation was named in the export. Evaluate the model before deploying it."]
    records = {title: read_run(path) for title, path in runs.items()}
    columns = {title: _headline(record["results"]) for title, record in records.items()}
    runs_behind = "\n".join(f"- {title}: {_whose(record, sizes)}, {_how(record)}" for title, record in records.items())
    return ["## Evaluation", numbers(columns), runs_behind]


def _whose(record: Mapping[str, Any], sizes: Sizes) -> str:
    """Return whose results these are: an evaluation may be of a parent, or of these weights before the export."""
    checkpoint = record.get("inputs", {}).get("checkpoint", {})
    weights = checkpoint.get("content", {}).get("weights")
    if weights is None:
        return "of weights that the run has not recorded"
    if weights in (sizes.fingerprint, sizes.source_fingerprint):
        return OWN if weights == sizes.fingerprint else f"{OWN} before the export"
    return f"of other weights ({Path(checkpoint['path']).name}, fingerprint {weights[:12]})"


def _how(record: Mapping[str, Any]) -> str:
    machine = record.get("hardware", {})
    where = ", ".join(machine.get("gpus") or [f"{machine.get('cpu_cores')} CPU cores"])
    return (
        f"`{record.get('command')}` (seed {record.get('seed')}, {record.get('seconds')} s on {where}, code "
        f"{record.get('git_commit')})"
    )


def _headline(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results without those of single environments."""
    return {key: value for key, value in results.items() if key.count("/") < 2}


def numbers(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Return results as a Markdown table: a row for each key, a column for each run, standard errors after values."""
    keys = dict.fromkeys(key for results in columns.values() for key in results)
    rows = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for key in keys:
        if any(part.endswith(ERROR) for part in key.split("/")):
            continue
        cells = [_cell(results, key) for results in columns.values()]
        rows.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(results: Mapping[str, Any], key: str) -> str:
    if key not in results:
        return ""
    first, slash, rest = key.partition("/")
    error = next((results[name] for name in (f"{first}{ERROR}{slash}{rest}", f"{key}{ERROR}") if name in results), None)
    return _number(results[key]) + ("" if error is None else f" ± {_number(error)}")


def _number(value: Any) -> str:
    if isinstance(value, str):
        return value.replace("|", "\\|")
    return f"{value:.4g}" if isinstance(value, float) and not value.is_integer() else f"{value:.0f}"


def _serving(facts: Facts) -> list[str]:
    is_child, stock_type = facts.format == "puzzle", facts.family.model_type
    remote = ", trust_remote_code=True" if is_child else ""
    code = (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto"{remote})\n'
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n"
        'inputs = tokenizer.apply_chat_template([{"role": "user", "content": "..."}], add_generation_prompt=True,\n'
        '                                       reasoning_effort="high", return_dict=True, return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=4096)[0]))\n```"
    )
    flag = " --kv-cache-dtype fp8" if facts.kv_layers else ""
    install = "pip install --no-deps CHECKOUT_OF_LIT_PUZZLE\n" if is_child else ""
    engine = f"```bash\n{install}vllm serve FOLDER{flag}\n```"
    why = (
        f"transformers needs only the included {facts.family.child.modeling_file.name}; vLLM needs the plugin of "
        "lit_puzzle."
        if is_child
        else f"This is a stock {stock_type} checkpoint; every runtime that supports {stock_type} can load it."
    )
    stops = ", ".join(str(token) for token in facts.stop_tokens)
    ends = (
        f"Generation must stop at each of the tokens {stops} (generation_config.json). Set these stop tokens in "
        "engines that do not read that file; otherwise generation continues after a tool call. "
        "`sha256sum -c SHA256SUMS` checks the files."
    )
    return ["## Serving", why, code, engine, ends]


def _limits(card: Card, facts: Facts) -> list[str]:
    lines = ["Only what the tables above show was measured, with transformers; other engines round differently."]
    if facts.rounding.rounded_experts:
        lines.append(
            f"{facts.rounding.rounded_experts} experts were rounded to MXFP4 by this export (relative error "
            f"{facts.rounding.relative_error():.4g}). Results and KV scales from before the export are of the weights "
            "before rounding."
        )
    if facts.kv_layers:
        lines.append(
            "An FP8 KV cache changes completions slightly, and its scales are valid for the weights they were "
            f"calibrated on. Scales: {facts.scales_from}."
        )
        rest = [str(layer) for layer in range(len(facts.blocks)) if layer not in facts.kv_layers]
        if rest:
            lines.append(f"Layers {', '.join(rest)} have no KV scales: keep their cache in bfloat16.")
    if facts.format == "masked":
        lines.append("Removed experts are present and masked by the router: use this folder only to check engines.")
    lines.append("Use the chat template: the model was trained with its reasoning channel and not tested without it.")
    return ["## Limits", "\n".join(f"- {line}" for line in [*lines, *([card.remarks] if card.remarks else [])])]
