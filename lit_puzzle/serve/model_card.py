"""The model card of an exported folder: README.md with the front matter of the Hugging Face hub.

It says what the layers are, how they were trained, what was measured, how to serve them and where that ends. Every
number comes from the folder itself or from the run.json of a run that the recipe names; nothing is typed by hand.

Reads run.json files. Writes nothing: the card is a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_puzzle.model.safetensors_file import read_json
from lit_puzzle.run.folder import RECORD, require_input
from lit_puzzle.serve.configs import Blocks
from lit_puzzle.serve.hub import REPOSITORY

PICTURE = "plan.png"
ERROR = "_se"


@dataclass(frozen=True)
class Card:
    """What the card says that the folder does not know.

    Attributes:
        name: Title.
        parent: The model that was pruned; a name on the hub (OWNER/NAME) becomes its `base_model`.
        license: The parent's license as the hub abbreviates it (`apache-2.0`); it holds for the child.
        training: Run folders of what was trained, in order.
        evaluations: Column title -> run folder of an evaluation.
        remarks: Sentences for the section on limits.
    """

    name: str = "A child of gpt-oss"
    parent: str = "unknown"
    license: str = "unknown"
    training: list[Path] = field(default_factory=list)
    evaluations: dict[str, Path] = field(default_factory=dict)
    remarks: str = ""


@dataclass(frozen=True)
class Facts:
    """What the card says of the folder.

    Attributes:
        form: `puzzle`, `stock` or `masked`.
        blocks: Experts and window of every layer.
        parent_experts: Experts of a layer before pruning, where plan.json says so.
        packed: Layers with MXFP4 experts.
        kv_layers: Layers with KV scales.
        scales_from: Where they come from.
        stop_tokens: What ends an answer.
        copied_experts: Experts that got the bytes of an MXFP4 parent.
        rounded_experts: Experts that this export rounded to MXFP4.
        rounding_error: Their relative error.
        parameters: Number of parameters.
        weight_bytes: Bytes of all tensors.
        context_tokens: Longest context.
    """

    form: str
    blocks: Blocks
    parent_experts: int | None
    packed: frozenset[int]
    kv_layers: frozenset[int]
    scales_from: str
    stop_tokens: Sequence[int]
    copied_experts: int
    rounded_experts: int
    rounding_error: float
    parameters: int
    weight_bytes: int
    context_tokens: int


def read_run(path: Path) -> dict[str, Any]:
    """The run.json of a finished run.

    Args:
        path: A run folder, or a run.json.

    Raises:
        ValueError: It is missing, of a run that has not finished, or without results.
    """
    found = require_input(path, "run for the model card")
    record = read_json(found / RECORD if found.is_dir() else found)
    if not isinstance(record.get("results"), Mapping):
        raise ValueError(f"{path}: {RECORD} has no results; name a run folder that the command wrote")
    return record


def card_text(card: Card, facts: Facts) -> str:
    """The whole card."""
    sections = [_front_matter(card, facts), f"# {card.name}", _opening(card, facts), *_plan(facts)]
    sections += _training(card.training) + _evaluation(card.evaluations) + _serving(facts) + _limits(card, facts)
    return "\n\n".join(sections) + "\n"


def _front_matter(card: Card, facts: Facts) -> str:
    front: dict[str, Any] = {"license": card.license, "library_name": "transformers"}
    front["pipeline_tag"] = "text-generation"
    if REPOSITORY.fullmatch(card.parent):
        front["base_model"] = card.parent
    kind = ["gpt_oss_puzzle"] if facts.form == "puzzle" else ["gpt_oss"]
    front["tags"] = [*kind, "mixture-of-experts", "pruned", *(["mxfp4"] if facts.packed else [])]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---"


def _opening(card: Card, facts: Facts) -> str:
    return (
        f"A pruned Mixture-of-Experts reasoning model: layers of {card.parent} with fewer experts, and with windows in "
        f"place of some full attention. {facts.parameters:,} parameters, {facts.weight_bytes:,} bytes of weights, "
        f"{facts.context_tokens:,} tokens of context. Made with lit_puzzle by the Puzzle method (arXiv 2411.19146 and "
        f"2602.11937). License: that of the parent, {card.license}."
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
        return ["## Training", "The export was told of no training run."]
    sections = ["## Training"]
    for path in runs:
        record = read_run(path)
        sections += [_how(record), numbers({"result": record["results"]})]
    return sections


def _evaluation(runs: Mapping[str, Path]) -> list[str]:
    if not runs:
        return ["## Evaluation", "The export was told of no evaluation: measure before you deploy."]
    records = {title: read_run(path) for title, path in runs.items()}
    columns = {title: _headline(record["results"]) for title, record in records.items()}
    told = "\n".join(f"- {title}: {_how(record)}" for title, record in records.items())
    return ["## Evaluation", numbers(columns), told]


def _how(record: Mapping[str, Any]) -> str:
    machine = record.get("hardware", {})
    where = ", ".join(machine.get("gpus") or [f"{machine.get('cpu_cores')} CPU cores"])
    return (
        f"`{record.get('command')}` (seed {record.get('seed')}, {record.get('seconds')} s on {where}, code "
        f"{record.get('git_commit')})"
    )


def _headline(results: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is told for each environment by itself."""
    return {key: value for key, value in results.items() if key.count("/") < 2}


def numbers(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Results as a table: a row a key, a column a run, standard errors behind what they belong to."""
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
    remote = ", trust_remote_code=True" if facts.form == "puzzle" else ""
    code = (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto"{remote})\n'
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n"
        'inputs = tokenizer.apply_chat_template([{"role": "user", "content": "..."}], add_generation_prompt=True,\n'
        '                                       reasoning_effort="high", return_dict=True, return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=4096)[0]))\n```"
    )
    flag = " --kv-cache-dtype fp8" if facts.kv_layers else ""
    install = "pip install --no-deps CHECKOUT_OF_LIT_PUZZLE\n" if facts.form == "puzzle" else ""
    engine = f"```bash\n{install}vllm serve FOLDER{flag}\n```"
    why = (
        "gpt_oss.py, which comes along, is all that transformers needs; vLLM needs lit_puzzle's plugin."
        if facts.form == "puzzle"
        else "This is plain gpt-oss: runtimes that know gpt-oss need nothing else."
    )
    stops = ", ".join(str(token) for token in facts.stop_tokens)
    ends = (
        f"Answers end at any of the tokens {stops} (generation_config.json); an engine that does not read that file "
        "must be told, or tool calls run on. `sha256sum -c SHA256SUMS` checks the files."
    )
    return ["## Serving", why, code, engine, ends]


def _limits(card: Card, facts: Facts) -> list[str]:
    lines = ["What the tables above do not show has not been measured; they are of transformers, other engines round."]
    if facts.rounded_experts:
        lines.append(
            f"{facts.rounded_experts} experts were rounded to MXFP4 by this export (relative error "
            f"{facts.rounding_error:.4g}); what was measured before that, KV scales too, is not of these very weights."
        )
    if facts.kv_layers:
        lines.append(
            "An FP8 KV cache changes answers a little, and its scales hold for the weights they were measured on. "
            f"These are {facts.scales_from}."
        )
        rest = [str(layer) for layer in range(len(facts.blocks)) if layer not in facts.kv_layers]
        if rest:
            lines.append(f"Layers {', '.join(rest)} have no KV scales: their cache is to stay in bfloat16.")
    if facts.form == "masked":
        lines.append("Removed experts are still there, masked by the router: this folder checks engines, nothing else.")
    lines.append("Keep the chat template: the model was made with its reasoning channel, and is untested without.")
    return ["## Limits", "\n".join(f"- {line}" for line in [*lines, *([card.remarks] if card.remarks else [])])]
