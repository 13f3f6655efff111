"""What a class, dataclass or function takes, and its defaults, read from its source file without importing it.

Importing a stage loads torch, which takes seconds; its signature is in the source all the same. Reads files of this
package only: other libraries' classes are unknown (None). Defaults are what the source says: numbers, texts, lists,
calls of dataclasses (`Sampling(temperature=0.0)`) and names of constants. Writes nothing.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "lit_puzzle"
ROOT = Path(__file__).parents[2]
REQUIRED = object()  # stands for the default of a parameter that has none
_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


@dataclass(frozen=True)
class Parameter:
    """A key of a recipe.

    Attributes:
        default: its value where a recipe has none; `REQUIRED` if there is no default. Of a dataclass: the mapping of
            the fields that the default names.
        kinds: dotted names of the classes in its type.
        is_mapping: whether its type is a `dict`, whose values replace each other and are not merged.
    """

    default: Any
    kinds: tuple[str, ...]
    is_mapping: bool


@functools.cache
def parameters_of(dotted: str) -> Mapping[str, Parameter] | None:
    """Return the parameters of a function, of a class's constructor, or the fields of a dataclass.

    Args:
        dotted: dotted name, such as `lit_puzzle.rl.module.RLRecovery`.

    Returns:
        Name -> parameter; None for what is not defined in this package.
    """
    found = _definition(dotted)
    if isinstance(found, ast.FunctionDef):
        return _signature(found, _module(dotted))
    if not isinstance(found, ast.ClassDef):
        return None
    if is_dataclass(dotted):
        return _fields(found, dotted)
    init = next((node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"), None)
    return {} if init is None else _signature(init, _module(dotted))


@functools.cache
def is_dataclass(dotted: str) -> bool:
    """Return whether a dotted name is a dataclass of this package."""
    found = _definition(dotted)
    decorators = found.decorator_list if isinstance(found, ast.ClassDef) else []
    return any("dataclass" in ast.unparse(node) for node in decorators)


@functools.cache
def _parsed(module: str) -> ast.Module | None:
    file = ROOT / Path(*module.split("."))
    for path in (file.with_suffix(".py"), file / "__init__.py"):
        if module.partition(".")[0] == PACKAGE and path.is_file():
            return ast.parse(path.read_text())
    return None


def _module(dotted: str) -> str:
    return dotted.rpartition(".")[0]


def _definition(dotted: str) -> ast.stmt | None:
    tree = _parsed(_module(dotted))
    name = dotted.rpartition(".")[2]
    named = (node for node in (tree.body if tree else ()) if isinstance(node, ast.ClassDef | ast.FunctionDef))
    return next((node for node in named if node.name == name), None)


@functools.cache
def _imports(module: str) -> Mapping[str, str]:
    """Return the dotted name of each name that a module imports or defines."""
    tree = _parsed(module)
    names: dict[str, str] = {}
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {(alias.asname or alias.name.partition(".")[0]): alias.asname or "" for alias in node.names}
    defined = (node for node in (tree.body if tree else ()) if isinstance(node, ast.ClassDef | ast.FunctionDef))
    return names | {node.name: f"{module}.{node.name}" for node in defined}


def _dotted(node: ast.expr, module: str) -> str:
    text = ast.unparse(node)
    first, _, rest = text.partition(".")
    whole = _imports(module).get(first) or first
    return f"{whole}.{rest}" if rest else whole


def _signature(node: ast.FunctionDef, module: str) -> dict[str, Parameter]:
    names = [argument for argument in node.args.args if argument.arg != "self"]
    defaults = [REQUIRED] * (len(names) - len(node.args.defaults)) + [_value(d, module) for d in node.args.defaults]
    keywords = [REQUIRED if d is None else _value(d, module) for d in node.args.kw_defaults]
    pairs = [*zip(names, defaults, strict=True), *zip(node.args.kwonlyargs, keywords, strict=True)]
    return {argument.arg: _parameter(argument.annotation, default, module) for argument, default in pairs}


def _fields(node: ast.ClassDef, dotted: str) -> dict[str, Parameter]:
    module, found = _module(dotted), dict[str, Parameter]()
    for base in node.bases:
        found |= dict(parameters_of(_dotted(base, module)) or {})
    for field in node.body:
        is_field = isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation)
        is_field &= "init=False" not in ast.unparse(field)  # what the class computes itself
        if is_field and isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            default = REQUIRED if field.value is None else _value(field.value, module)
            found[field.target.id] = _parameter(field.annotation, default, module)
    return found


def _parameter(annotation: ast.expr | None, default: Any, module: str) -> Parameter:
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    kinds, is_mapping = [], False
    for node in _alternatives(annotation):
        if isinstance(node, ast.Subscript):
            is_mapping |= ast.unparse(node.value) in ("dict", "Mapping")
        elif node is not None and ast.unparse(node) == "dict":
            is_mapping = True
        elif node is not None:
            kinds.append(_dotted(node, module))
    return Parameter(default, tuple(kinds), is_mapping)


def _alternatives(node: ast.expr | None) -> list[ast.expr | None]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _alternatives(node.left) + _alternatives(node.right)
    return [node]


def _value(node: ast.expr, module: str) -> Any:
    """Return the value of an expression; a call of a class gives the mapping of its arguments."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Tuple | ast.List):
        return [_value(item, module) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_value(key, module) for key in node.keys if key is not None]
        return dict(zip(keys, [_value(value, module) for value in node.values], strict=True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, module)
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _ARITHMETIC[type(node.op)](_value(node.left, module), _value(node.right, module))
    if isinstance(node, ast.Lambda):
        return _value(node.body, module)
    if isinstance(node, ast.Call):
        return _called(node, module)
    return _named(_dotted(node, module), module)


def _called(node: ast.Call, module: str) -> Any:
    name = ast.unparse(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg is not None}
    if name == "field":
        made = given.get("default_factory") or given.get("default")
        if made is None:
            return REQUIRED
        empty: dict[str, Any] = {"list": [], "dict": {}}
        return empty.get(ast.unparse(made)) if ast.unparse(made) in empty else _value(made, module)
    if name in ("list", "tuple", "dict", "Path") and node.args:
        return _value(node.args[0], module)
    positional = list(parameters_of(_dotted(node.func, module)) or {})
    given |= dict(zip(positional, node.args, strict=False))
    return {key: _value(value, module) for key, value in given.items()}


def _named(dotted: str, module: str) -> Any:
    """Return a constant by its name, the mapping {} for a class of this package, or else the dotted name."""
    home, _, name = dotted.rpartition(".")
    tree = _parsed(home or module)
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id == name:
                return _value(node.value, home or module)
    return {} if is_dataclass(dotted) else dotted
