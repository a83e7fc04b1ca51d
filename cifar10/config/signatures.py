"""What DeepSpeed and PyTorch accept, read from their source: importing them takes seconds, and this is for refusing at once.

A type is an annotation as it stands there: `bool`, `Optional[int]`, `tuple[float, float]`, a class of the same file.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cifar10 import UsageError

LARGEST = 1e300  # a larger integer may not fit a float


@dataclass(frozen=True)
class Module:
    """One source file of an installed package."""

    path: Path
    tree: ast.Module = field(compare=False)

    def find(self, name: str) -> tuple[Module, ast.stmt] | None:
        """Where a name is defined, in this file or in the one that it is imported from; None outside of this package."""
        for statement in self.tree.body:
            if isinstance(statement, ast.ClassDef) and statement.name == name:
                return self, statement
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
                return self, statement
            if isinstance(statement, ast.ImportFrom) and name in [alias.asname or alias.name for alias in statement.names]:
                original = next(alias.name for alias in statement.names if name == (alias.asname or alias.name))
                for there in self._imported(statement):
                    return module(there).find(original)
        return None

    def _imported(self, statement: ast.ImportFrom) -> Iterator[Path]:
        """The file that an import statement names, if it is one of the same package."""
        package, *words = (statement.module or "").split(".")
        if statement.level:
            folders, words = [self.path.parents[statement.level - 1]], [package, *words]
        else:
            folders = [parent for parent in self.path.parents if parent.name == package]
        for where in (folder.joinpath(*words) for folder in folders[:1]):
            yield from (path for path in (where.with_suffix(".py"), where / "__init__.py") if path.is_file())


@cache
def module(path: Path) -> Module:
    return Module(path, ast.parse(path.read_text(encoding="utf-8")))


@cache
def source(package: str, file: str) -> Module:
    """A source file of an installed package, which is not imported. Raises UsageError if the package is not installed."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UsageError(f"{package} is not installed; run uv sync")
    return module(Path(found.submodule_search_locations[0], file))


@dataclass(frozen=True)
class Parameter:
    """A field of a class, or an argument of its constructor."""

    where: Module
    annotation: ast.expr | None
    required: bool
    limits: dict[str, float] = field(default_factory=dict)  # of pydantic: gt, ge, le
    replaced_by: str = ""  # for a deprecated one
    default: Any = None  # if it is a number, a text or a switch

    def wrong(self, value: Any) -> str:
        """What is expected instead of this value; empty if it is accepted."""
        if self.annotation is not None and not _accepts(self.where, self.annotation, value):
            return _words(self.where, self.annotation)
        if _is_number(value):
            for name, sign, holds in (("gt", ">", operator.gt), ("ge", ">=", operator.ge), ("le", "<=", operator.le)):
                if name in self.limits and not holds(value, self.limits[name]):
                    return f"a number {sign} {self.limits[name]:g}"
        return ""

    @property
    def model(self) -> dict[str, Parameter] | None:
        """The fields of the class that a value of this parameter stands for; None if its type is no class with fields."""
        names = {node.id for node in ast.walk(self.annotation) if isinstance(node, ast.Name)} if self.annotation else set()
        found = [self.where.find(name) for name in sorted(names)]
        classes = [(where, node) for where, node in filter(None, found) if isinstance(node, ast.ClassDef)]
        return next((fields(where, node.name) for where, node in classes if not _enumerated(where, node)), None)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST  # false for nan


def _enumerated(where: Module, node: ast.stmt) -> list[Any]:
    """The values of an enumeration."""
    if not isinstance(node, ast.ClassDef) or not any(ast.unparse(base).endswith("Enum") for base in node.bases):
        return []
    constants = (one.value for one in node.body if isinstance(one, ast.Assign))
    return list(dict.fromkeys(constant.value for constant in constants if isinstance(constant, ast.Constant)))


def _accepts(where: Module, kind: ast.expr, value: Any) -> bool:
    """Whether a value read from JSON has this type; a whole float is an int, as DeepSpeed takes 5e8."""
    match kind:
        case ast.Constant(value=str(text)):
            return _accepts(where, ast.parse(text, mode="eval").body, value)
        case ast.Constant():
            return value is kind.value
        case ast.BinOp():
            return _accepts(where, kind.left, value) or _accepts(where, kind.right, value)
        case ast.Subscript(value=ast.Name(id=name)):
            inner = kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]
            if name in ("Optional", "Union"):
                return (name == "Optional" and value is None) or any(_accepts(where, one, value) for one in inner)
            if name == "Literal":
                return value in [ast.literal_eval(one) for one in inner]
            if name in ("tuple", "Tuple"):
                sized = isinstance(value, list) and len(value) == len(inner)
                return sized and all(_accepts(where, one, item) for one, item in zip(inner, value, strict=True))
            return _accepts(where, kind.value, value)
        case ast.Name(id=name):
            basic = {"bool": bool, "str": str, "Path": str, "list": list, "List": list, "dict": dict, "Tensor": ()}
            if name in basic:
                return isinstance(value, basic[name])
            if name in ("int", "float"):
                return _is_number(value) and (name == "float" or value == math.floor(value))
            if found := where.find(name):
                there, node = found
                if isinstance(node, ast.Assign):
                    return _accepts(there, node.value, value)
                return (
                    value in values if (values := _enumerated(there, node)) and value is not True else isinstance(value, dict)
                )
    return True


def _words(where: Module, kind: ast.expr) -> str:
    """A type in words."""
    text = ast.unparse(kind)
    known = {"bool": "true or false", "int": "an integer", "float": "a number", "str": "a text", "list": "a list: [...]"}
    if isinstance(kind, ast.Name) and (found := where.find(kind.id)) and (values := _enumerated(*found)):
        return " or ".join(map(str, values))
    for noise in ("Optional[", "Union[", " | None", " | Tensor", ", Tensor"):
        text = text.replace(noise, "")
    name = text.rstrip("]") if "[" not in text else text
    return known.get(name, "an object: {...}" if name.endswith("Config") else text.replace("tuple", "a list of "))


@cache
def fields(where: Module, name: str) -> dict[str, Parameter]:
    """The fields of a pydantic model, each under its name and under its alias."""
    _, node = where.find(name) or (None, None)
    found: dict[str, Parameter] = {}
    for one in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            call = one.value if isinstance(one.value, ast.Call) else None
            given = {word.arg: word.value for word in call.keywords} if call else {}
            limits = {key: ast.literal_eval(given[key]) for key in ("gt", "ge", "le") if key in given}
            extra = given.get("json_schema_extra")
            pairs = zip(extra.keys, extra.values, strict=True) if isinstance(extra, ast.Dict) else ()
            newer = next((value.value for key, value in pairs if key.value == "new_param"), "")
            for key in (one.target.id, *([given["alias"].value] if "alias" in given else [])):
                found[key] = Parameter(where, one.annotation, one.value is None, limits, newer)
    return found


def _kind_of(default: ast.expr | None) -> ast.expr | None:
    """The type of an argument without an annotation, if its default is a switch or a number."""
    known = {bool: "bool", int: "float", float: "float"}
    name = known.get(type(default.value)) if isinstance(default, ast.Constant) else None
    return ast.Name(name) if name else None


@cache
def arguments(where: Module, name: str) -> dict[str, Parameter]:
    """The arguments of a class's constructor, without self and the first one (the parameters or the optimizer)."""
    there, node = where.find(name) or (where, None)
    inits = (one for one in getattr(node, "body", ()) if isinstance(one, ast.FunctionDef) and one.name == "__init__")
    for init in inits:
        words = init.args
        missing = [None] * (len(words.args) - len(words.defaults))
        pairs = [
            *zip(words.args, [*missing, *words.defaults], strict=True),
            *zip(words.kwonlyargs, words.kw_defaults, strict=True),
        ]
        kinds = [(word.arg, word.annotation or _kind_of(default), default) for word, default in pairs[2:]]
        return {name: Parameter(there, kind, one is None, default=getattr(one, "value", None)) for name, kind, one in kinds}
    return {}


def names(where: Module, *, ending: str = "") -> list[str]:
    """The public classes that a file defines, or imports under their own name."""
    defined = [one.name for one in where.tree.body if isinstance(one, ast.ClassDef)]
    imported = [
        alias.asname for one in where.tree.body if isinstance(one, ast.ImportFrom) for alias in one.names if alias.asname
    ]
    return [name for name in (*defined, *imported) if name[0].isupper() and name.endswith(ending)]


def constants(where: Module, *wanted: str) -> dict[str, Any]:
    """The values of a file's constants, which may be made of constants above them."""
    known: dict[str, Any] = {}
    for one in where.tree.body:
        if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name):
            try:
                known[one.targets[0].id] = eval(compile(ast.Expression(one.value), "", "eval"), {"__builtins__": {}}, known)
            except Exception:
                continue  # made of what is imported
    return {name: known[name] for name in wanted}
