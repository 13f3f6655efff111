"""Grades how a final text follows several instructions at once: 1 if it follows all of them, else 0.

A gold answer is JSON: `{"instruction_id_list": [id, ...], "kwargs": [{...} | null, ...]}`, as IFEval and its
descendants have it. What each id means: `instruction_checks` and `more_instruction_checks`. Ids that are not known and
values that are missing are refused when a file is read, by its row.

Reads and writes nothing. Texts of more than 200,000 characters follow nothing.
"""

import json
from typing import Any

from lit_puzzle.environments.graders.instruction_checks import CHECKS, RELATIONS, parameters
from lit_puzzle.environments.graders.more_instruction_checks import MORE_CHECKS
from lit_puzzle.environments.graders.worker_pool import require_library
from lit_puzzle.environments.verdict import RIGHT, Verdict

KNOWN = CHECKS | MORE_CHECKS
LANGUAGES = ("language:response_language", "change_case:english_capital", "change_case:english_lowercase")
MAX_CHARACTERS = 200_000
FORM = '{"instruction_id_list": [id, ...], "kwargs": [{...}, ...]}'


def read_instructions(value: Any, place: str) -> str:
    """Return the gold answer of instructions as text.

    Args:
        value: an object of the form above; `instruction_kwargs` is another name of `kwargs`.
        place: where it stands, for messages.

    Raises:
        ValueError: another form, an unknown instruction, or one that lacks a value or has a wrong one.
    """
    ids = value.get("instruction_id_list") if isinstance(value, dict) else None
    given = (value.get("kwargs") or value.get("instruction_kwargs")) if isinstance(value, dict) else None
    if not isinstance(ids, list) or not ids or not isinstance(given, list) or len(given) != len(ids):
        raise ValueError(
            f"{place}: instructions must have the form {FORM}, of equal lengths; got {str(value)[:120]!r}."
        )
    pairs = [(name, _checked(name, kwargs, place)) for name, kwargs in zip(ids, given)]
    return json.dumps({"instruction_id_list": ids, "kwargs": [kwargs for _, kwargs in pairs]}, ensure_ascii=False)


def _checked(name: Any, kwargs: Any, place: str) -> dict[str, Any]:
    """Return what an instruction says, without the nulls that tables of many kinds have."""
    if not isinstance(name, str) or name not in KNOWN:
        raise ValueError(
            f"{place}: the instruction {str(name)[:60]!r} is not known. Known are {', '.join(sorted(KNOWN))}."
        )
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ValueError(f"{place}: the kwargs of {name} are {str(kwargs)[:60]!r}; an object or null is expected.")
    values = {key: value for key, value in (kwargs or {}).items() if value is not None}
    needed = parameters(KNOWN[name])
    missing = sorted(needed - set(values))
    if missing:
        raise ValueError(f"{place}: the instruction {name} needs {missing}, got {sorted(values)}.")
    if name in LANGUAGES:
        require_library("language", f"{place}: the instruction {name}")
    return {key: _typed(name, key, values[key], place) for key in sorted(needed)}


def _typed(name: str, key: str, value: Any, place: str) -> Any:
    if "relation" in key and not (isinstance(value, str) and value in RELATIONS):
        raise ValueError(f"{place}: {name}: {key} is {value!r}; known are {', '.join(RELATIONS)}.")
    if key in ("keywords", "forbidden_words"):
        ok = isinstance(value, list) and bool(value) and all(isinstance(word, str) and word.strip() for word in value)
    elif key.startswith(("num_", "nth_", "n_")) or key in ("frequency", "let_frequency", "capital_frequency", *"Nnm"):
        ok = isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0  # no NaN, no infinity
        value = int(value) if ok else value  # Parquet has made floats of whole numbers with nulls among them
    else:
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        ok = isinstance(value, str) and bool(value.strip() or key == "prompt_to_repeat")
    if not ok:
        raise ValueError(f"{place}: {name}: {key} is {str(value)[:60]!r}, which it cannot be.")
    return value


def grade_instructions(final: str, gold: str) -> Verdict:
    """Return 1 if a text follows all instructions; the reason names those that it does not follow."""
    if len(final) > MAX_CHARACTERS:
        return Verdict(0.0, f"wrong: more than {MAX_CHARACTERS:,} characters")
    wanted = json.loads(gold)
    pairs = list(zip(wanted["instruction_id_list"], wanted["kwargs"]))
    missed = [name for name, kwargs in pairs if not final.strip() or not KNOWN[name](final, **kwargs)]
    if not missed:
        return RIGHT
    return Verdict(0.0, f"wrong: {len(missed)} of {len(pairs)} instructions: {', '.join(missed)}"[:300])
