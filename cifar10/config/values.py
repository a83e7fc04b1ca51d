"""Values that are written as calls: `RandomCrop(4)` in --augment, `step(30, 0.1)` in --lr-schedule. Nothing is executed."""

import ast
import dataclasses
import math
import re
from dataclasses import dataclass
from inspect import signature
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cifar10 import nearest

WORD = re.compile(r"[^\s()]+(?:\s*\((?:[^()]|\([^()]*\)?)*\)?)?|\S")  # a name, and its arguments in parentheses


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value has this type; an int is a float too, and a bool is neither."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(is_a(value, one) for one in args)
    if origin is Literal:
        return value in args
    if origin in (tuple, list):
        return isinstance(value, origin) and all(is_a(one, args[0]) for one in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def is_positive(value: float) -> bool:
    return 0 < value < math.inf  # false for nan


def require(sound: bool, expected: str) -> None:
    """Raise ValueError with what is expected, unless arguments are sound."""
    if not sound:
        raise ValueError(expected)


@dataclass(frozen=True)
class Value:
    """One of the classes of its kind; its fields are its arguments, those that are keyword-only by name."""

    @classmethod
    def name(cls) -> str:
        return cls.__name__

    def __str__(self) -> str:
        given = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        words = [f"{field.name}={_written(value)}" for field, value in given if field.kw_only and value != field.default]
        given = [(field, value) for field, value in given if not field.kw_only]
        while given and given[-1][1] == given[-1][0].default:
            given.pop()
        arguments = ", ".join([*(_written(value) for _, value in given), *words])
        return self.name() + (f"({arguments})" if arguments else "")


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_written, value))}{',' if len(value) == 1 else ''})"
    return str(value).removesuffix(".0")


def classes(base: type[Value]) -> dict[str, type[Value]]:
    """All values of a kind by name; a class whose name begins with an underscore is only derived from."""
    found = {}
    for kind in base.__subclasses__():
        found |= ({} if kind.__name__.startswith("_") else {kind.name(): kind}) | classes(kind)
    return found


def _literal(node: ast.expr) -> Any:
    value = node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
    return tuple(value) if isinstance(value, list) else value


def _allowed(wanted: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "True or False"}
    if get_origin(wanted) is tuple:
        return f"{'two numbers' if ... not in get_args(wanted) else 'numbers'} in brackets"
    return words.get(wanted) or " or ".join(get_args(wanted))


def read(text: str, base: type[Value], what: str) -> Any:
    """`Cutout(12)` -> Cutout(size=12), a value of the kind `base`, which is called `what`. Raises ValueError."""
    name, _, arguments = text.strip().partition("(")
    if (kind := classes(base).get(name := name.strip())) is None and re.fullmatch(r"[A-Za-z]\w*(-\w+)*", name):
        raise ValueError(f"unknown {what}{nearest(name, sorted(classes(base)))}")
    try:
        call = ast.parse(f"f({arguments}" if arguments else "f()", mode="eval").body
        args, keywords = [_literal(arg) for arg in call.args], {word.arg: _literal(word.value) for word in call.keywords}
    except (SyntaxError, AttributeError, ValueError, TypeError):
        kind = None
    if kind is None:
        raise ValueError("expected a name with arguments in parentheses")
    try:
        given = signature(kind).bind(*args, **keywords).arguments
    except TypeError:
        raise ValueError(f"expected {name}({', '.join(signature(kind).parameters)})") from None
    for argument, value in given.items():
        if not is_a(value, wanted := get_type_hints(kind)[argument]):
            raise ValueError(f"{argument} is {value}, expected {_allowed(wanted)}")
    return kind(**given)
