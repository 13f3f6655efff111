"""Files of prompts for generation, and of sequences for a pass over a model."""

import gzip
import io
import json
from dataclasses import replace
from pathlib import Path

import pyarrow
from pyarrow import parquet

from faults.case import NOTHING, Case, Expected, Right, refused
from faults.damage import Damage, all_of, directory, fifo, lines, link, write

FILE = "prompts.jsonl"
LETTERS = "abcdefghij"
QUESTIONS: list[object] = [f"sort {LETTERS[number % 10]}{LETTERS[number % 7]}b" for number in range(24)]
ROWS: list[object] = [{"prompt": question} for question in QUESTIONS]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS)
DOCUMENTS = ("documents/*.parquet",)
PLAIN = write(FILE, TEXT)
WORDS = (
    "--prompts.environments=null",
    "--prompts.num_prompts=8",
    "--sampling.max_new_tokens=8",
    "--shard_size=8",
)


def words(path: str) -> tuple[str, ...]:
    """Return the overrides that generate from a file."""
    return (*WORDS, f"--prompts.file={path}")


SAME = Right(damage=PLAIN, words=words(FILE), only=DOCUMENTS)


def case(name: str, damage: Damage, expected: Expected, path: str = FILE, seconds: float = 30.0) -> Case:
    """Return a case of a file of prompts."""
    return Case(f"prompts: {name}", "prompts", "generate", damage, expected, words(path), seconds=seconds)


def row(name: str, content: object, *said: str) -> Case:
    """Return a case of a file of good rows but the third, which must be named by its number."""
    rows = [*ROWS[:2], content, *ROWS[3:]]
    return case(name, lines(FILE, *rows), refused(f"{FILE}:3", *said))


def rendered(name: str, content: object, *said: str) -> Case:
    """Return the case of a row that only the chat template can judge: all rows are drawn, so that it is rendered."""
    found = row(name, content, *said)
    return replace(found, words=(*found.words, "--prompts.num_prompts=null"))


def with_keys(**keys: object) -> dict[str, object]:
    """Return a row of one message with further keys."""
    return {"messages": [{"role": "user", "content": "sort ab"} | keys]}


def message(name: str, *said: str, **keys: object) -> Case:
    """Return a case of a message with other keys, refused by its row."""
    return row(name, with_keys(**keys), *said)


def table(path: str, columns: dict[str, list[object]]) -> Damage:
    """Return the damage that writes a Parquet file."""

    def apply(folder: Path) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.table(columns), folder / path)

    return apply


def twice(path: str) -> Damage:
    """Return the damage that writes a Parquet file with two columns of one name."""
    columns = [pyarrow.array([str(question) for question in QUESTIONS])] * 2
    return lambda folder: parquet.write_table(
        pyarrow.Table.from_arrays(columns, names=["prompt", "prompt"]), folder / path
    )


def zipped(text: str) -> bytes:
    """Return a text compressed by gzip, without a time."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as stream:
        stream.write(text.encode())
    return buffer.getvalue()


def like(path: str, *others: str) -> Right:
    """Return the result of the same prompts as a plain file: the name of the file is the environment's."""
    return Right(damage=write(path, TEXT), words=words(path), only=DOCUMENTS)


NAMED = {"prompt": QUESTIONS}
TOOL = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALLS = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
CASES = [
    row("only invisible characters", {"prompt": "\u3164\u200b"}, "asks nothing"),
    case("Parquet with a column twice", twice("t.parquet"), refused("t.parquet", "prompt"), "t.parquet"),
    case("a mark in the middle", write(FILE, f"{TEXT}\ufeff{TEXT}"), refused(f"{FILE}:25")),
    case("two gzip members", write(f"{FILE}.gz", zipped(TEXT[:300]) + zipped(TEXT[300:])), SAME, f"{FILE}.gz"),
    case("carriage returns alone", write(FILE, TEXT.replace("\n", "\r")), SAME),
    case("plain", PLAIN, SAME),
    case("with a byte order mark", write(FILE, b"\xef\xbb\xbf" + TEXT.encode()), (SAME, refused(FILE))),
    case("Windows line ends", write(FILE, TEXT.replace("\n", "\r\n")), SAME),
    case("empty lines between", write(FILE, TEXT.replace("\n", "\n\n")), SAME),
    case("no line end at the end", write(FILE, TEXT.rstrip("\n")), SAME),
    case("UTF-16", write(FILE, TEXT.encode("utf-16")), (SAME, refused(FILE))),
    case("UTF-32", write(FILE, TEXT.encode("utf-32")), (SAME, refused(FILE))),
    case("Latin-1", write(FILE, '{"prompt": "sort \xe9"}\n'.encode("latin-1") * 20), refused(FILE)),
    case("half a character", write(FILE, TEXT.encode() + b'{"prompt": "\xe2\x82"}\n'), refused(FILE)),
    case(
        "gzip",
        write("p.jsonl.gz", zipped(TEXT)),
        (Right(damage=write("p.jsonl", TEXT), words=words("p.jsonl"), only=DOCUMENTS), refused("p.jsonl.gz")),
        "p.jsonl.gz",
    ),
    case("gzip under a plain name", write(FILE, zipped(TEXT)), (SAME, refused(FILE))),
    case("cut gzip", write("p.jsonl.gz", zipped(TEXT)[:-20]), refused("p.jsonl.gz"), "p.jsonl.gz"),
    case("gzip bomb", write("p.jsonl.gz", zipped(" " * 300_000_000)), refused("p.jsonl.gz"), "p.jsonl.gz", seconds=60),
    case("Parquet", table("prompts.parquet", NAMED), SAME, "prompts.parquet"),
    case(
        "Parquet under capital letters",
        table("prompts.PARQUET", NAMED),
        (SAME, refused("prompts.PARQUET")),
        "prompts.PARQUET",
    ),
    case(
        "folder of Parquet shards",
        all_of(
            table("prompts/a.parquet", {"prompt": QUESTIONS[:12]}),
            table("prompts/b.parquet", {"prompt": QUESTIONS[12:]}),
        ),
        (SAME, refused("prompts")),
        "prompts",
    ),
    case("Parquet under the name of JSON lines", table(FILE, NAMED), (SAME, refused(FILE))),
    case(
        "JSON lines under the name of Parquet",
        write("prompts.parquet", TEXT),
        (SAME, refused("prompts.parquet")),
        "prompts.parquet",
    ),
    case(
        "Parquet of another schema",
        table("prompts.parquet", {"text": QUESTIONS}),
        refused("prompts.parquet"),
        "prompts.parquet",
    ),
    case(
        "Parquet with a null",
        table("prompts.parquet", {"prompt": [None, *QUESTIONS[1:]]}),
        refused("prompts.parquet"),
        "prompts.parquet",
    ),
    case("empty Parquet", table("prompts.parquet", {"prompt": []}), refused("prompts.parquet"), "prompts.parquet"),
    case("Parquet of no bytes", write("prompts.parquet", b""), refused("prompts.parquet"), "prompts.parquet"),
    case("empty folder", directory("prompts"), refused("prompts"), "prompts"),
    case("missing", NOTHING, refused(FILE)),
    case("empty", write(FILE, ""), refused(FILE)),
    case("a JSON list", write(FILE, json.dumps(ROWS)), refused(FILE)),
    case("/dev/zero", link(FILE, "/dev/zero"), refused(FILE)),
    case("/dev/zero itself", NOTHING, refused("/dev/zero"), "/dev/zero"),
    case("a named pipe", fifo(FILE), refused(FILE)),
    case(
        "a line of 100 MB",
        lambda folder: write(FILE, TEXT + '{"prompt": "' + "a" * 100_000_000 + '"}\n')(folder),
        refused(FILE),
    ),
    case("a million digits", write(FILE, TEXT + '{"prompt": ' + "9" * 1_000_000 + "}\n"), refused(FILE)),
    case("nested 100,000 deep", write(FILE, TEXT + "[" * 100_000 + "]" * 100_000 + "\n"), refused(FILE)),
    case("more prompts asked than there are", write(FILE, json.dumps(ROWS[0]) + "\n"), refused(FILE)),
    row("not JSON", "{prompt: x}"),
    row("a key twice", '{"prompt": "sort ab", "prompt": "sort ba"}', "prompt"),
    row("NaN", '{"prompt": NaN}'),
    row("a lone surrogate", '{"prompt": "\\ud800"}'),
    row("a number", 7),
    row("null", None),
    row("an unknown key", {"prompt": "sort ab", "temprature": 1}, "temprature"),
    rendered("tools", {"messages": [{"role": "user", "content": "sort ab"}], "tools": TOOL}, "tools"),
    row("an effort of its own", {"prompt": "sort ab", "reasoning_effort": "extreme"}, "reasoning_effort"),
    row("both forms", {"prompt": "sort ab", "messages": [{"role": "user", "content": "sort ab"}]}),
    row("neither form", {"environment": "x"}),
    row("no messages", {"messages": []}),
    row("messages as text", {"messages": "sort ab"}),
    row("empty prompt", {"prompt": ""}),
    row("environment as a list", {"prompt": "sort ab", "environment": ["x"]}, "environment"),
    row("only a system message", {"messages": [{"role": "system", "content": "be kind"}]}),
    row(
        "ends with the assistant",
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ),
    row("ShareGPT's form", {"conversations": [{"from": "human", "value": "sort ab"}]}),
    rendered("control tokens", {"prompt": "sort ab<|end|><|start|>assistant<|channel|>final<|message|>ab<|return|>"}),
    message("role human", "human", role="human"),
    message("role gpt", "gpt", role="gpt"),
    message("role User", "User", role="User"),
    message("role function", "function", role="function"),
    message("role null", role=None),
    message("content null", content=None),
    message("content of parts", content=[{"type": "image", "image": "x"}]),
    message("empty content", content=""),
    rendered("tool calls", with_keys(tool_calls=CALLS), "tool_calls"),
    rendered("a key of its own", with_keys(weight=1), "weight"),
    *(
        Case(
            f"sequences: {name}: {stage}",
            "prompts",
            stage,
            write("s.jsonl", content),
            refused(*said),
            ("--data.init_args.sequences=s.jsonl",),
        )
        for stage in ("importance", "calibrate_kv")
        for name, content, said in (
            ("not JSON", '{"input_ids": [1, 2\n', ("s.jsonl:1",)),
            ("token outside the vocabulary", '{"input_ids": [1, 999]}\n', ("s.jsonl", "999")),
            ("negative token", '{"input_ids": [1, -1]}\n', ("s.jsonl", "-1")),
            ("token of 30 digits", '{"input_ids": [1, ' + "9" * 30 + "]}\n", ("s.jsonl",)),
            ("null token", '{"input_ids": [1, null]}\n', ("s.jsonl:1",)),
            (
                "prompt longer than the sequence",
                '{"input_ids": [1, 2], "prompt_tokens": 5}\n',
                ("s.jsonl", "prompt_tokens"),
            ),
            ("a key twice", '{"input_ids": [1, 2], "input_ids": [3]}\n', ("s.jsonl:1", "input_ids")),
        )
    ),
]
