"""Folders of documents and top-k logits that are damaged, or of another parent."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from faults.case import Case, Right, refused
from faults.damage import DROP, Damage, cut, directory, edit, remove, write

FOLDER = "runs/generate/documents"
SHARD, RECORD = f"{FOLDER}/shard-00001.parquet", f"{FOLDER}/documents.json"
OF_ANOTHER = edit(f"{FOLDER}/documents.json", {"fingerprint": "0" * 64})
ANY = "--data.init_args.filter.written_by=any"
READERS = ("distill", "precompute_logits", "distill_blocks")


def column(name: str, change: Callable[[list[Any]], object], kind: pyarrow.DataType | None = None) -> Damage:
    """Return the damage of one column of the second shard."""

    def apply(folder: Path) -> None:
        found = parquet.read_table(folder / SHARD)
        values = found[name].to_pylist()
        change(values)
        place = found.column_names.index(name)
        field = pyarrow.field(name, kind or found.schema.field(name).type)
        made = found.set_column(place, field, pyarrow.array(values, field.type))
        (folder / SHARD).unlink()
        parquet.write_table(made.replace_schema_metadata(found.schema.metadata), folder / SHARD)

    return apply


def case(name: str, damage: Damage, *words: str, stage: str = "distill") -> Case:
    """Return a case of refused documents."""
    return Case(f"documents: {name}: {stage}", "prompts", stage, damage, refused(*words))


def null_token(rows: list[Any]) -> None:
    """Put a null in the place of a token."""
    rows[3][5] = None


CASES = [
    *(
        case("a null token", column("input_ids", null_token), "shard-00001.parquet", "document 3", stage=stage)
        for stage in READERS
    ),
    *(case("cut shard", cut(SHARD, 0.6), "shard-00001.parquet", stage=stage) for stage in READERS),
    *(case("missing shard", remove(SHARD), "shard-00001.parquet", stage=stage) for stage in READERS),
    *(
        case("of another parent", OF_ANOTHER, "documents", "filter.written_by", stage=stage)
        for stage in ("distill", "distill_blocks")
    ),
    *(
        Case(
            f"documents: of another parent, by a key: {stage}",
            "prompts",
            stage,
            OF_ANOTHER,
            Right(only=computed),
            words,
        )
        for stage, computed, words in (
            ("distill", ("child/*",), (ANY,)),
            ("distill_blocks", ("library/*",), (ANY,)),
            ("precompute_logits", ("top_logits/*.safetensors",), ()),  # has no filter and says whose they are
        )
    ),
    case("another tokenizer", edit(RECORD, {"tokenizer": "0" * 64}), "documents", "tokenizer"),
    case(
        "a shard that was exchanged",
        column("input_ids", lambda rows: rows[0].__setitem__(3, 9)),
        "shard-00001.parquet",
        "sha256|checksum|documents.json",
    ),
    case(
        "a shard that was exchanged",
        column("input_ids", lambda rows: rows[0].__setitem__(3, 9)),
        "shard-00001.parquet",
        "sha256|checksum|documents.json",
        stage="precompute_logits",
    ),
    case(
        "a null document",
        column("input_ids", lambda rows: rows.__setitem__(3, None)),
        "shard-00001.parquet",
        "document 3",
    ),
    case(
        "an empty document",
        column("input_ids", lambda rows: rows.__setitem__(3, [])),
        "shard-00001.parquet",
        "document 3",
    ),
    case(
        "a mask of another length",
        column("loss_mask", lambda rows: rows[3].append(1)),
        "shard-00001.parquet",
        "document 3",
    ),
    case(
        "a mask of 2", column("loss_mask", lambda rows: rows[3].__setitem__(1, 2)), "shard-00001.parquet", "document 3"
    ),
    case(
        "a null in the mask",
        column("loss_mask", lambda rows: rows[3].__setitem__(1, None)),
        "shard-00001.parquet",
        "document 3",
    ),
    case(
        "a token outside the vocabulary",
        column("input_ids", lambda rows: rows[3].__setitem__(1, 128)),
        "shard-00001.parquet",
        "document 3",
    ),
    case(
        "a negative token",
        column("input_ids", lambda rows: rows[3].__setitem__(1, -7)),
        "shard-00001.parquet",
        "document 3",
    ),
    case(
        "a token of 40 bits",
        column("input_ids", lambda rows: rows[3].__setitem__(1, 1 << 40), pyarrow.list_(pyarrow.int64())),
        "shard-00001.parquet",
    ),
    case(
        "tokens as text",
        column(
            "input_ids",
            lambda rows: [rows.__setitem__(n, ["a"]) for n in range(len(rows))],
            pyarrow.list_(pyarrow.string()),
        ),
        "shard-00001.parquet",
    ),
    case(
        "another column type",
        column("effort", lambda rows: [rows.__setitem__(n, n) for n in range(len(rows))], pyarrow.int64()),
        "shard-00001.parquet",
    ),
    case(
        "an unknown effort",
        column("effort", lambda rows: rows.__setitem__(2, "extreme")),
        "shard-00001.parquet",
        "extreme",
    ),
    case("no record", remove(RECORD), "documents.json"),
    case("cut record", cut(RECORD, 0.5), "documents.json"),
    case("record is a list", write(RECORD, "[]"), "documents.json"),
    case("record without shards", edit(RECORD, {"shards": DROP}), "documents.json", "shards"),
    case("record without vocabulary size", edit(RECORD, {"vocab_size": DROP}), "documents.json", "vocab_size"),
    case("record with a text as vocabulary size", edit(RECORD, {"vocab_size": "many"}), "documents.json", "vocab_size"),
    case("record with a count of shards that is wrong", edit(RECORD, {"shards.1.documents": 11}), "documents"),
    case("a folder in the place of a shard", directory(SHARD), "shard-00001.parquet"),
    *(
        Case(
            f"top-k logits: {name}",
            "training",
            "distill",
            damage,
            refused(*words),
            ("--model.init_args.parent=runs/precompute_logits/top_logits", "--model.init_args.loss.hidden=0"),
            ("runs/precompute_logits",),
        )
        for name, damage, words in (
            (
                "missing shard",
                remove("runs/precompute_logits/top_logits/shard-00001.safetensors"),
                ("shard-00001.safetensors",),
            ),
            (
                "cut shard",
                cut("runs/precompute_logits/top_logits/shard-00001.safetensors", 0.5),
                ("shard-00001.safetensors",),
            ),
            (
                "of other documents",
                edit("runs/precompute_logits/top_logits/top_logits.json", {"documents": "0" * 64}),
                ("top_logits", "documents"),
            ),
            (
                "of another parent",
                edit("runs/precompute_logits/top_logits/top_logits.json", {"fingerprint": "0" * 64}),
                ("top_logits", "parent|fingerprint"),
            ),
            ("cut record", cut("runs/precompute_logits/top_logits/top_logits.json", 0.5), ("top_logits.json",)),
            (
                "negative k",
                edit("runs/precompute_logits/top_logits/top_logits.json", {"top_k": -1}),
                ("top_logits.json", "top_k"),
            ),
            ("no record", remove("runs/precompute_logits/top_logits/top_logits.json"), ("top_logits.json",)),
        )
    ),
]
