"""Turns error messages of jsonargparse, trees of indented lines, into one line that says what is wrong and where.

jsonargparse lists every type of a union that a value does not match, level by level:

    Parser key "model":
      Does not validate against any of the Union subtypes
      Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]
      Errors:
        - Problem with given class_path 'lit_puzzle.rl.module.RLRecovery':
            Parser key "dtype":
              Expected a typing.Literal['float32', 'bfloat16']. Got value: foo
        - Expected a <class 'NoneType'>
      Given value type: ...

becomes `model.init_args.dtype: expected float32 or bfloat16, got foo`. Of a union, the deepest branch is reported; if
no branch has details, all types are listed. Reads and writes nothing.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass

NAMES = {"NoneType": "null", "str": "text", "dict": "a mapping", "list": "a list"}
CALLABLE = re.compile(r"Type .* expects a function or a callable class: (.*)")
MISSING = "missing key(s):"
SILENT = ("Expected a ", "Not a valid subclass", "Subclass types expect")  # say no more than the list of all types
UNION = "Does not validate against any of the Union subtypes"
KEY, CLASS = re.compile(r'Parser key "([^"]*)":?\s*(.*)'), re.compile(r"Problem with given class_path '([^']*)':?")


@dataclass
class Node:
    """A line of a message and the lines that are indented below it."""

    text: str
    children: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class Fault:
    """A wrong value.

    Attributes:
        keys: its keys, outermost first.
        text: what is wrong with it.
    """

    keys: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        """Return both in one line."""
        return f"{'.'.join(self.keys)}: {self.text}" if self.keys else self.text


def one_line(message: str) -> str:
    """Return a message of the parser as one line.

    Args:
        message: as jsonargparse words it.
    """
    fault, classes = _fault(_tree(message)), re.findall(CLASS, message)
    in_list = len(classes) > 1 or "\n  Given value: [" in message
    return f"{fault} (in {classes[-1]})" if in_list and classes and classes[-1] not in fault.text else str(fault)


def _tree(message: str) -> list[Node]:
    """Return the lines of a message by their indentation; a bullet counts as two blanks."""
    root = Node("")
    above = [(-1, root)]
    for line in message.splitlines():
        text = line.replace("- ", "  ", 1) if line.lstrip().startswith("- ") else line
        if not text.strip():
            continue
        indent = len(text) - len(text.lstrip())
        while above[-1][0] >= indent:
            above.pop()
        node = Node(text.strip())
        above[-1][1].children.append(node)
        above.append((indent, node))
    return root.children


def _fault(nodes: Sequence[Node]) -> Fault:
    """Return the fault that the lines of one level describe."""
    nodes = [node for node in nodes if not node.text.startswith("Expected a path but ")] or nodes
    for index, node in enumerate(nodes):
        if node.text.startswith(UNION):
            return _fault_of_union(nodes[index:])
        key, problem, function = KEY.match(node.text), CLASS.match(node.text), CALLABLE.match(node.text)
        inside = node.children or nodes[index + 1 :]
        if key:
            fault = _fault([Node(key[2]), *node.children] if key[2] else inside)
            return fault if key[1] == "config" else Fault((key[1], *fault.keys), fault.text)
        if problem:
            fault = _fault(inside)
            return Fault((*_steps_into(problem[1], fault), *fault.keys), fault.text)
        if function:
            fault = _fault([Node(function[1]), *inside])  # its last line ends with the whole object
            return Fault(("init_args", *fault.keys) if fault.keys else (), fault.text.rpartition(". Got value: ")[0])
    return Fault((), _worded(" ".join(_texts(nodes))))


def _fault_of_union(nodes: Sequence[Node]) -> Fault:
    """Return the fault of the deepest branch of a union, or the types of all branches."""
    branches = [branch for node in nodes if node.text == "Errors:" for branch in node.children]
    telling = [branch for branch in branches if not branch.text.startswith(SILENT)]
    subtypes, value = (
        next(node.text.removeprefix(start) for node in nodes if node.text.startswith(start))
        for start in ("Subtypes: ", "Given value: ")
    )
    if telling:
        fault = max((_fault([branch]) for branch in telling), key=lambda fault: len(fault.keys))
        # Where a branch repeats the value between blanks, jsonargparse cuts it out.
        return Fault(fault.keys, fault.text.replace("Import path does not", f"import path {value} does not"))
    return Fault((), expected(subtypes[1:-1], value))


def _texts(nodes: Sequence[Node]) -> Iterator[str]:
    for node in nodes:
        yield node.text
        yield from _texts(node.children)


def _steps_into(class_path: str, fault: Fault) -> tuple[str, ...]:
    """Return the keys from an object to its arguments: none for a dataclass, which is written without a class."""
    if not fault.keys and not fault.text.startswith(MISSING):  # the class itself is wrong
        return ()
    module, _, name = class_path.rpartition(".")
    return () if is_dataclass(vars(importlib.import_module(module))[name]) else ("init_args",)


def _worded(text: str) -> str:
    """Return one sentence of the parser in our words."""
    if path := re.match(r"Expected a dot import path string: (.*)", text):
        return f"expected a class path such as package.module.Class, got {path[1]}"
    if wanted := re.match(r"Expected a (.*?)(?:\. Got value: (.*))?$", text):
        return expected(wanted[1], wanted[2])
    if required := re.match(r"the following arguments are required: (.*)", text):
        return f"{MISSING} {required[1]}"
    if unreadable := re.match(r"Unable to load config ['\"](.*?)['\"]", text):
        return f"expected a mapping of keys to values, got {unreadable[1]}"
    if protocol := re.search(r"does not implement protocol (\w+)$", text):
        return f"{text}: its methods need the names, arguments and annotations that {protocol[1]} has"
    if word := re.fullmatch(r"unrecognized arguments: (?!-)(\w[\w.]*=.*)", text):
        return f"{text}. Did you mean --{word[1]}?"
    return text


def expected(types: str, given: str | None) -> str:
    """Return which types or values are allowed, and what was given instead."""
    nested = re.match(r"NestedArg\(key='[^']*', val=(.*)\)$", given or "")  # --key.inside=value
    value = nested[1].strip("'") if nested else given
    words = [word for kind in _split(types) for word in _type_words(kind)]
    listed = ", ".join(dict.fromkeys(words))
    head, _, last = listed.rpartition(", ")
    return f"expected {f'{head} or {last}' if head else last}" + (f", got {value}" if value else "")


def _split(types: str) -> list[str]:
    """Return the parts between the commas that stand outside brackets."""
    parts, depth = [""], 0
    for character in types:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _type_words(kind: str) -> list[str]:
    """Return a type as a user knows it: a name, or the values that are allowed."""
    if kind.startswith("typing.Literal["):
        return [word.strip("'") for word in _split(kind.removeprefix("typing.Literal[").removesuffix("]"))]
    name = re.sub(r"<class '([^']*)'>", r"\1", kind)
    name = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", name)
    return [NAMES.get(name, name)]
