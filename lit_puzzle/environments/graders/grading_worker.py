r"""A process of its own for graders that a text can hold up: one that computes without end ends only this process.

Started by `lit_puzzle.environments.graders.worker_pool` with the number of an open connection; imports the standard
library, and math-verify or jsonschema when the first job needs it. A job is JSON: `kind` and what the kind needs.
Replies: `{"begun": true}` once the library is there, then the result, or `{"failed": why}`.

    symbolic    gold, answer: LaTeX           -> {"correct": bool}, or {"unreadable": "gold" | "answer"}
    schema      schema: JSON schema, value    -> {"correct": bool, "why": text}

math-verify reads LaTeX by a grammar (ANTLR); its other reader, which hands plain text to sympy's `parse_expr` and so to
`eval`, is not used. Memory is limited, files cannot be written, and the kernel ends a job by its CPU time.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

MEMORY_BYTES = 2 << 30


def symbolic() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return the comparison of expressions by math-verify."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)  # it warns once that its own limit (SIGALRM) is off
    sys.set_int_max_str_digits(0)  # bounded by memory and time
    config = [LatexExtractionConfig()]

    def read(latex: str) -> list[Any]:
        text = f"$\\boxed{{{latex}}}$"
        return parse(text, config, fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None)

    def compare(job: dict[str, Any]) -> dict[str, Any]:
        sides = {side: read(job[side]) for side in ("gold", "answer")}
        unreadable = [side for side, found in sides.items() if not found]
        if unreadable:
            return {"unreadable": unreadable[0]}
        return {"correct": bool(verify(sides["gold"], sides["answer"], timeout_seconds=None, raise_on_error=True))}

    return compare


def schema() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return the validation of values by jsonschema; references to other documents are refused."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    def validate(job: dict[str, Any]) -> dict[str, Any]:
        chosen = validator_for(job["schema"], default=Draft202012Validator)
        try:
            found = next(chosen(job["schema"], registry=Registry()).iter_errors(job["value"]), None)
        except (SchemaError, Unresolvable) as error:
            return {"failed": f"the schema cannot be used: {error}"[:300]}
        return {"correct": found is None, "why": "" if found is None else found.json_path}

    return validate


KINDS = {"symbolic": symbolic, "schema": schema}


def reply_to(job: dict[str, Any], grader: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of a job, or why there is none."""
    try:
        return grader(job)
    except MemoryError:
        return {"failed": f"it needs more than {MEMORY_BYTES >> 30} GiB"}
    except RecursionError:
        return {"failed": "it is nested too deeply"}
    # Sympy and the parsers raise whatever a strange expression leads to; the job fails, not the run.
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        NotImplementedError,
        TypeError,
        ValueError,
    ) as error:
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def main(descriptor: int) -> None:
    """Answer jobs of all kinds until the other end is closed."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    os.environ.clear()
    answer_jobs(descriptor, cache(lambda kind: KINDS[kind]()))


def answer_jobs(descriptor: int, grader_of: Callable[[str], Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Answer jobs until the other end is closed; the kernel ends one that takes longer than its `seconds`.

    Args:
        descriptor: of the connection.
        grader_of: the grader of a kind of jobs; may take time to load.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = Connection(descriptor)
    while True:
        try:
            job = json.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            return
        grader = grader_of(job["kind"])
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime + job["seconds"]) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        connection.send_bytes(b'{"begun": true}')
        connection.send_bytes(json.dumps(reply_to(job, grader)).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]))
