"""No function takes more than 8 arguments, no dataclass of settings has more than 10 fields."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lit_puzzle"
MOST_ARGUMENTS, MOST_FIELDS = 8, 10


def definitions(text: str) -> Iterator[tuple[str, int, int]]:
    """Name, number and limit of the arguments of every function and of the fields of every dataclass."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            found = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            yield node.name, len([each for each in found if each.arg not in ("self", "cls")]), MOST_ARGUMENTS
        elif isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(each) for each in node.decorator_list):
            fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
            yield node.name, len([each for each in fields if "ClassVar" not in ast.unparse(each)]), MOST_FIELDS


def test_signatures_are_short() -> None:
    files = [path for path in PACKAGE.glob("**/*.py") if "assets" not in path.parts]
    files += (PACKAGE / "callbacks").glob("*.py")  # a link, which ** does not follow everywhere
    assert len(files) > 150
    long = [
        f"{path.relative_to(PACKAGE)}: {name} has {number}, at most {limit}"
        for path in files
        for name, number, limit in definitions(path.read_text())
        if number > limit
    ]
    assert long == []


def test_a_long_signature_is_seen() -> None:
    arguments, fields = ", ".join(f"a{index}" for index in range(8)), "\n".join(f"    a{i}: int" for i in range(11))
    text = (
        f"class A:\n    def __init__(self, {arguments}, *, last): pass\n@dataclass(frozen=True)\nclass B:\n{fields}\n"
    )
    assert sorted(definitions(text)) == [("B", 11, 10), ("__init__", 9, 8)]
