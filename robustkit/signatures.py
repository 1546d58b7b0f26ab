"""A plugin's parameters, read from its source with `ast`: nothing is imported and no code of a user's runs."""

from __future__ import annotations

import ast
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

from robustkit import params
from robustkit.classes import definition, lineage, parse
from robustkit.errors import UsageError

CONTEXT = frozenset({"shape", "classes", "num_classes", "in_channels", "model", "self"})
"""Arguments that robustkit fills in; a recipe cannot set them."""
REQUIRED = inspect.Parameter.empty
_BASIC: dict[str, Any] = {
    "float": params.Number,
    "int": params.Integer,
    "bool": bool,
    "str": str,
    "None": None,
    "Any": Any,
    "Path": str,
    **{name: getattr(params, name) for name in dir(params) if name[0].isupper() and name != "Annotated"},
}
_GENERIC: dict[str, Any] = {"list": list, "tuple": tuple, "dict": dict, "Sequence": list, "Mapping": dict}
_DYNAMIC = object()


@dataclass(frozen=True)
class Parameter:
    """One parameter of a plugin: its annotation as written, the type values are checked with, its default."""

    name: str
    annotation: str
    type: Any
    default: Any = REQUIRED

    @property
    def required(self) -> bool:
        """Whether a recipe must give it."""
        return self.default is REQUIRED


def read_summary(path: Path, name: str) -> str | None:
    """Return the first docstring line of a class or function; "" without one; None where it is not defined."""
    node = definition(path, name)
    if node is None:
        return None
    return (ast.get_docstring(node) or "").strip().partition("\n")[0]


def classes_of(path: Path, base: str) -> tuple[str, ...]:
    """Return the names of the classes in a file that name this base."""
    return tuple(
        node.name
        for node in parse(path).body
        if isinstance(node, ast.ClassDef) and any(isinstance(one, ast.Name) and one.id == base for one in node.bases)
    )


def functions_of(path: Path, decorator: str) -> tuple[str, ...]:
    """Return the names of the functions in a file that carry this decorator."""
    return tuple(
        node.name
        for node in parse(path).body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(one, ast.Call) and getattr(one.func, "id", "") == decorator for one in node.decorator_list)
    )


def read_parameters(path: Path, name: str, *, untyped: bool = False) -> tuple[Parameter, ...]:
    """Return the parameters of a dataclass, a class with `__init__`, or a function, in order; inherited ones too.

    `untyped`: where an argument has no annotation, its type is taken from its default (users' code, libraries).
    """
    node = definition(path, name)
    if node is None:
        raise UsageError(f"{path} defines no {name!r}")
    if isinstance(node, ast.FunctionDef):
        return tuple(_arguments(node, untyped))
    chain = [one for _, one in lineage(path, name)]
    for position, one in enumerate(chain):
        for item in one.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                return tuple(_arguments(item, untyped))
        if _is_dataclass(one):
            return _inherited(chain[position:])
    return ()


def _inherited(chain: list[ast.ClassDef]) -> tuple[Parameter, ...]:
    """Return the fields of a dataclass in the order of its `__init__`: those of its bases first."""
    fields: dict[str, Parameter] = {}
    for node in reversed(chain):
        if _is_dataclass(node):
            # What another library annotates its fields with is not for a recipe to know.
            fields |= {one.name: one for one in _fields(node, lenient=node is not chain[0])}
    return tuple(fields.values())


def function_parameters(node: ast.FunctionDef) -> tuple[Parameter, ...]:
    """Return the parameters of a library's function, in order."""
    return tuple(_arguments(node, untyped=True))


def untyped_parameter(name: str, default: ast.expr | None) -> Parameter:
    """Return a parameter that only its default tells of."""
    value = _default(default)
    kind, text = _kind_of(value)
    return Parameter(name, text, kind, value)


def _is_dataclass(node: ast.ClassDef) -> bool:
    heads = [one.func if isinstance(one, ast.Call) else one for one in node.decorator_list]
    return any(getattr(head, "id", getattr(head, "attr", "")) == "dataclass" for head in heads)


def _fields(node: ast.ClassDef, *, lenient: bool) -> Iterator[Parameter]:
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            name, text = item.target.id, ast.unparse(item.annotation)
            hidden = name.startswith("_") or text.startswith(("ClassVar", "InitVar"))
            if not hidden and not _not_in_init(item.value):
                yield Parameter(name, text, resolve(item.annotation, lenient=lenient), _default(item.value))


def _not_in_init(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Call) and any(
        word.arg == "init" and isinstance(word.value, ast.Constant) and word.value.value is False
        for word in value.keywords
    )


def _arguments(node: ast.FunctionDef, untyped: bool) -> Iterator[Parameter]:
    spec = node.args
    positional = [*spec.posonlyargs, *spec.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(spec.defaults))
    pairs = [
        *zip(positional, [*missing, *spec.defaults], strict=True),
        *zip(spec.kwonlyargs, spec.kw_defaults, strict=True),
    ]
    for argument, value in pairs:
        if argument.arg in CONTEXT:
            continue
        default = _default(value)
        if argument.annotation is not None:
            yield Parameter(
                argument.arg, ast.unparse(argument.annotation), resolve(argument.annotation, lenient=untyped), default
            )
        else:
            kind, text = _kind_of(default)
            yield Parameter(argument.arg, text, kind, default)


def _kind_of(default: Any) -> tuple[Any, str]:  # noqa: ANN401
    for kind, text in ((bool, "bool"), (int, "int"), (float, "float"), (str, "str")):
        if type(default) is kind:
            # Libraries write 0 or 1 where any number is meant.
            return (params.Number, "float") if text == "float" else (_BASIC[text], text)
    return Any, "any"


def _default(node: ast.expr | None) -> Any:  # noqa: ANN401
    if node is None:
        return REQUIRED
    if isinstance(node, ast.Call):
        for word in node.keywords:
            if word.arg == "default":
                return _default(word.value)
        return None
    try:
        return ast.literal_eval(node)
    except ValueError:
        return _arithmetic(node)


def _arithmetic(node: ast.expr) -> Any:  # noqa: ANN401
    """Return `8/255` and the like; None for a default that is no literal."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        try:
            return ast.literal_eval(node.left) / ast.literal_eval(node.right)
        except (ValueError, TypeError, ZeroDivisionError):
            return None
    return None


def resolve(node: ast.expr, *, lenient: bool = False) -> Any:  # noqa: ANN401
    """Return the type that an annotation stands for, out of a fixed table.

    Raises:
        UsageError: the annotation is outside the table (with `lenient`: anything is accepted for it).
    """
    try:
        return _resolve(node)
    except UsageError:
        if lenient:
            return Any
        raise


def _resolve(node: ast.expr) -> Any:  # noqa: ANN401
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return _resolve(ast.parse(node.value, mode="eval").body)
        if node.value is None:
            return None
    if isinstance(node, ast.Name) and node.id in _BASIC:
        return _BASIC[node.id]
    if isinstance(node, ast.Name) and node.id in _GENERIC:
        return _GENERIC[node.id]
    if isinstance(node, ast.Attribute):
        return _resolve(ast.Name(node.attr))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return Union[_resolve(node.left), _resolve(node.right)]  # noqa: UP007
    if isinstance(node, ast.Subscript):
        return _subscript(node)
    raise UsageError(f"the annotation {ast.unparse(node)!r} is not one that a parameter may have")


def _subscript(node: ast.Subscript) -> Any:  # noqa: ANN401
    head = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
    inside = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if head == "Literal":
        return Literal[tuple(ast.literal_eval(one) for one in inside)]
    if head == "Optional":
        return Union[_resolve(inside[0]), None]  # noqa: UP007
    if head == "Union":
        return Union[tuple(_resolve(one) for one in inside)]  # noqa: UP007
    if head in _GENERIC:
        arguments = tuple(
            ... if isinstance(one, ast.Constant) and one.value is ... else _resolve(one) for one in inside
        )
        return types.GenericAlias(_GENERIC[head], arguments)
    raise UsageError(f"the annotation {ast.unparse(node)!r} is not one that a parameter may have")


def parameters_of_object(made: Callable[..., Any]) -> tuple[Parameter, ...]:
    """Return the parameters of an object that is imported already, by introspection."""
    function = made.__init__ if isinstance(made, type) else made  # type: ignore[misc]
    hints = typing.get_type_hints(function, include_extras=True)
    found = []
    for name, one in inspect.signature(made).parameters.items():
        if name in CONTEXT or one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
            continue
        kind = {float: params.Number, int: params.Integer}.get(hints.get(name, Any), hints.get(name, Any))
        text = one.annotation if isinstance(one.annotation, str) else getattr(kind, "__name__", str(kind))
        found.append(Parameter(name, text, kind, one.default))
    return tuple(found)
