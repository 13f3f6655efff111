"""A process of its own that renders chat templates: one that never ends, or eats memory, ends only this process.

Started by `lit_puzzle.model.chat` with the number of an open connection; imports nothing but the standard library and
jinja2. Each request is JSON: `template` (a number), `source` (its text, the first time), `variables` (null: only
compile), `date` and `seconds`. Each reply is `{"text": ...}` or `{"error": ...}`. A request may use `seconds` of CPU,
up to a second more, and `MEMORY_BYTES`; the kernel ends the process when it takes more time.

The environment is that of transformers' `apply_chat_template` (5.19): sandboxed, blocks trimmed, `break` and
`continue`, `{% generation %}`, `tojson` that keeps all characters, `raise_exception`, and `strftime_now`, which here
reads the date of the run and no clock.
"""

import json
import resource
import signal
import sys
from datetime import date
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 2 << 30
MAX_CHARACTERS = 64 << 20  # of a rendered prompt
NO_DATE = "it reads the clock, and no date is fixed for it (lit_puzzle.model.chat.fix_date)"


class GenerationBlock(Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks the assistant's text and changes nothing."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the statements inside, with a scope of their own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def compiled(source: str) -> Template:
    """Return a template that transformers would render in the same way."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source)


def to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    """Return a value as JSON, without the escapes for HTML of jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


def refuse(message: object) -> NoReturn:
    """Raise what a template finds wrong with the messages."""
    raise TemplateError(str(message))


def render(template: Template, variables: dict[str, Any], day: str | None) -> str:
    """Return the text of a prompt.

    Args:
        template: from `compiled`.
        variables: of the template.
        day: ISO date that `strftime_now` formats, at midnight.
    """

    def strftime_now(form: str) -> str:
        if day is None:
            raise TemplateError(NO_DATE)
        return date.fromisoformat(day).strftime(form)

    text = template.render(strftime_now=strftime_now, **variables)
    if len(text) > MAX_CHARACTERS:
        raise TemplateError(f"its text has {len(text):,} characters; {MAX_CHARACTERS:,} are allowed")
    return text


def answer(request: dict[str, Any], templates: dict[int, Template]) -> dict[str, str]:
    """Return the reply to a request; templates are kept by their number."""
    try:
        if "source" in request:
            templates[request["template"]] = compiled(request["source"])
        if request["variables"] is None:
            return {"text": ""}
        return {"text": render(templates[request["template"]], request["variables"], request["date"])}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_BYTES >> 30} GiB"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    # What the expressions of a template raise on values that they do not expect.
    except (
        TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        AssertionError,
    ) as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def main(descriptor: int) -> None:
    """Answer requests until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    connection, templates = Connection(descriptor), dict[int, Template]()
    connection.send_bytes(b"{}")  # ready
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + request["seconds"] + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        connection.send_bytes(json.dumps(answer(request, templates)).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]))
