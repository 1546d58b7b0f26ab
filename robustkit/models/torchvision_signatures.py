"""What torchvision's model builders take, read from their source with `ast`. Imports neither torch nor torchvision.

A builder hands its `**kwargs` on, to helpers and at last to the network's class: each name is followed to where it is
taken, less what is already given on the way, and what one of several helpers would refuse.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustkit.classes import definition
from robustkit.signatures import Parameter, function_parameters, untyped_parameter

FIXED_BY_ROBUSTKIT = frozenset({"weights", "progress", "aux_logits"})
"""Arguments that a recipe cannot set: models start from random weights and return logits alone."""
WEIGHTS = (
    "weights: models start from random weights, so that every variant is trained here and its data are known; leave it "
    "out"
)
BOUND = ("self", "cls")
Function = ast.FunctionDef


def builder_parameters(path: Path, name: str) -> tuple[Parameter, ...]:
    """Return the parameters that a recipe can give to a builder of torchvision."""
    node = definition(path, name)
    if not isinstance(node, ast.FunctionDef):
        return ()
    found = _open(path, node).parameters
    return tuple(one for one in found.values() if one.name not in FIXED_BY_ROBUSTKIT and _plain(one))


@dataclass(frozen=True)
class Taken:
    """The parameters that a call leaves open, all of them optional; `anything`: it refuses no other name either."""

    parameters: dict[str, Parameter]
    anything: bool

    def refuses(self, name: str) -> bool:
        """Say whether the call fails when it is given this name."""
        return not self.anything and name not in self.parameters


def _plain(parameter: Parameter) -> bool:
    """Say whether a recipe can hold it: a layer or a function it cannot."""
    return parameter.type is not Any or parameter.annotation == "any"


def _open(path: Path, node: Function) -> Taken:
    """Return what may come in through the `**kwargs` of a function."""
    if node.args.kwarg is None:
        return Taken({}, anything=False)
    rest = node.args.kwarg.arg
    calls = [one for one in ast.walk(node) if isinstance(one, ast.Call)]
    takers = [taker for call in calls if (taker := _passed(path, call, rest)) is not None]
    offered = [one for taker in takers for one in taker.parameters.values()]
    found = {one.name: one for one in offered if not any(taker.refuses(one.name) for taker in takers)}
    found.update({one.name: one for call in calls for one in _popped(call, rest)})
    for name in _overwritten(node, rest):
        found.pop(name, None)
    return Taken(found, anything=all(taker.anything for taker in takers))


def _popped(call: ast.Call, rest: str) -> Iterator[Parameter]:
    """Yield the parameter of `kwargs.pop("name", default)`."""
    head = call.func
    if isinstance(head, ast.Attribute) and head.attr == "pop" and getattr(head.value, "id", "") == rest:
        name, default = call.args[0], call.args[1] if len(call.args) > 1 else None
        if isinstance(name, ast.Constant) and isinstance(name.value, str) and not isinstance(default, ast.Call):
            yield untyped_parameter(name.value, default)


def _passed(path: Path, call: ast.Call, rest: str) -> Taken | None:
    """Return what a call with `**kwargs` leaves open of the signature that it calls; None for any other call."""
    if not any(word.arg is None and getattr(word.value, "id", "") == rest for word in call.keywords):
        return None
    target = _function(path, call)
    if target is None:
        return None
    names = [argument.arg for argument in (*target.args.posonlyargs, *target.args.args) if argument.arg not in BOUND]
    given = {*names[: len(call.args)], *(word.arg for word in call.keywords)}
    own = {one.name: one for one in function_parameters(target) if not one.required and one.name not in given}
    further = _open(path, target)
    return Taken({**own, **further.parameters}, further.anything)


def _function(path: Path, call: ast.Call) -> Function | None:
    """Return the function, constructor or class method that a call names, where the same file defines it."""
    head, method = call.func, "__init__"
    if isinstance(call.func, ast.Attribute):
        head, method = call.func.value, call.func.attr
    node = definition(path, head.id) if isinstance(head, ast.Name) else None
    if isinstance(node, ast.ClassDef):
        return next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == method), None)
    return node


def _overwritten(node: Function, rest: str) -> Iterator[str]:
    """Yield the names that a function sets in its kwargs whatever is given, and refuses to see given otherwise."""
    for line in node.body:
        if isinstance(line, ast.Expr) and isinstance(line.value, ast.Call) and len(line.value.args) == 3:
            target, name, _ = line.value.args
            if getattr(target, "id", "") == rest and isinstance(name, ast.Constant):
                yield str(name.value)
