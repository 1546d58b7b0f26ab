"""Boxes through a whole model, by the graph that torch.fx traces of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Target

from robustkit.certificates.boxes import LOWEST, Box, NoBounds, minus, over, plus, through_layer, times
from robustkit.errors import ModelError

RISING = frozenset({
    "relu", "relu_", "relu6", "tanh", "sigmoid", "logsigmoid", "hardtanh", "hardsigmoid", "softplus", "selu",
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "mean", "sum", "amax", "amin", "clamp", "clamp_min", "clamp_max", "flatten", "view", "reshape", "permute",
    "transpose", "squeeze", "unsqueeze", "expand", "contiguous", "clone", "getitem", "pad",
})  # fmt: skip
"""Functions and methods that never fall in any entry of their first argument, whatever their constants are."""
SHAPES = frozenset({"size", "dim", "numel", "ndimension"})
SAME = frozenset({"float", "double", "detach"})
"""Methods after which the values are what they were."""
IN_PLACE = frozenset({"iadd", "isub", "imul", "itruediv", "add_", "sub_", "mul_", "div_"})


def trace(model: nn.Module) -> fx.GraphModule:
    """Return the graph of a model in eval mode; it shares the model's weights.

    Raises:
        ModelError: torch.fx cannot follow its code.
    """
    try:
        # A bare layer of torch is traced as one layer, not through its functions.
        bare = fx.Tracer().is_leaf_module(model, "")
        return fx.symbolic_trace(nn.Sequential(model) if bare else model)
    except Exception as error:  # a model's own code runs, which may raise anything
        raise ModelError(
            f"interval bounds follow a model by torch.fx, which cannot trace {type(model).__name__}: {error}; "
            "randomized_smoothing only calls the model"
        ) from error


class Features:
    """What arrives at the last linear layer, with that layer: margins are tighter when it is merged with them."""

    def __init__(self, box: Box, head: nn.Linear) -> None:
        self.box = box
        self.head = head


def propagate(graph: fx.GraphModule, box: Box) -> Box | Features:
    """Return bounds of a traced model's output on a box of images (N, ...), or of what its last linear layer gets.

    Raises:
        ModelError: a layer or function has no bounds here; the message names it.
    """
    found = _Propagation(graph).run(box)
    if not isinstance(found, Box | Features):
        raise ModelError(f"interval: the model returns a {type(found).__name__} that does not depend on its images")
    return found


class _Propagation(fx.Interpreter):
    """Runs a graph on boxes; whatever does not depend on the images is computed as it is."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        # An error's message is for the person at the terminal, not one of the graph's.
        self.extra_traceback = False
        self.head, self.behind = _head(graph)

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401
        """Return the value of one node."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n in self.behind:
            return args[0]
        if n.op in ("placeholder", "output", "get_attr") or not any(map(_is_box, _flat((args, kwargs)))):
            return super().run_node(n)
        try:
            if n is self.head:
                return Features(args[0], self._layer(n))
            return self._bounds(n, args, kwargs)
        except NoBounds as error:
            raise ModelError(_unknown(n, str(error))) from error
        except (TypeError, RuntimeError, AttributeError, AssertionError) as error:
            raise ModelError(_unknown(n, f"{_name(n)}, called in a way that is not known ({error})")) from error

    def _layer(self, n: fx.Node) -> Any:  # noqa: ANN401
        return self.fetch_attr(str(n.target))

    def _bounds(self, n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        if n.op == "call_module":
            if len(args) != 1 or kwargs:
                raise NoBounds(f"{type(self._layer(n)).__name__} of several arguments")
            return through_layer(self._layer(n), args[0])
        if n.op == "call_function" and not _of_torch(n.target):
            raise NoBounds(f"the function {_name(n)}")
        method = n.op == "call_method"
        call: Callable[..., Any] = getattr(torch.Tensor, str(n.target)) if method else n.target  # type: ignore[assignment]
        return _through_function(_name(n), call, args, kwargs)


def _through_function(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    if name in SHAPES or name in ("getattr", "len"):
        return _shape(name, args)
    if name in SAME and not kwargs and len(args) == 1:
        return args[0]
    if name == "dropout" and kwargs.get("training", args[2] if len(args) > 2 else True) is False:
        return args[0]
    if name in LOWEST:
        kinds = {"none": name, "tanh": f"{name} tanh"}
        lowest = LOWEST[kinds[str(kwargs.get("approximate", "none"))]]
        return args[0].dip(lambda x: call(x, *args[1:], **kwargs), lowest)
    if name in ("cat", "concat", "stack"):
        return _joined(call, args, kwargs)
    if name in RISING and isinstance(args[0], Box) and not any(map(_is_box, _flat((args[1:], kwargs)))):
        return args[0].monotone(lambda x: call(x, *args[1:], **kwargs))
    if kwargs or len(args) not in (1, 2):
        raise NoBounds(f"the function {name}")
    found = _arithmetic(name.strip("_"), args)
    if name in IN_PLACE and isinstance(args[0], Box):
        # Whoever holds the box that was changed in place gets the changed one, as in the model.
        args[0].lower.copy_(found.lower)
        args[0].upper.copy_(found.upper)
        return args[0]
    return found


def _arithmetic(name: str, args: tuple[Any, ...]) -> Box:
    if name == "neg":
        return times(args[0], -1.0)
    if name in ("add", "iadd"):
        return plus(*args)
    if name in ("sub", "isub"):
        return minus(*args)
    if name in ("mul", "imul"):
        return times(*args)
    if name in ("truediv", "itruediv", "div") and isinstance(args[0], Box) and not isinstance(args[1], Box):
        return over(*args)
    raise NoBounds(f"the function {name}")


def _shape(name: str, args: tuple[Any, ...]) -> object:
    box = args[0]
    if name == "getattr":
        if args[1] not in ("shape", "ndim", "device", "dtype"):
            raise NoBounds(f"the attribute {args[1]}")
        return getattr(box.lower, args[1])
    return len(box.lower) if name == "len" else getattr(box.lower, name)(*args[1:])


def _joined(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Box:
    like = next(one for one in args[0] if isinstance(one, Box)).lower

    def side(name: str) -> list[Tensor]:
        return [getattr(one, name) if isinstance(one, Box) else one.to(like.dtype) for one in args[0]]

    return Box(call(side("lower"), *args[1:], **kwargs), call(side("upper"), *args[1:], **kwargs))


def _head(graph: fx.GraphModule) -> tuple[fx.Node | None, frozenset[fx.Node]]:
    """Return the last linear layer if its output is all that is returned, and nodes behind it that change nothing."""
    output = next(node for node in graph.graph.nodes if node.op == "output")
    node, behind = output.args[0], list[fx.Node]()
    while isinstance(node, fx.Node) and len(node.users) == 1:
        layer = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:
            return node, frozenset(behind)
        unchanged = node.op == "call_method" and node.target in (*SAME, "contiguous")
        if not (unchanged or isinstance(layer, nn.Identity | nn.Dropout)):
            break
        behind.append(node)
        node = node.args[0]
    return None, frozenset()


def _of_torch(target: Target) -> bool:
    module = getattr(target, "__module__", None) or ""
    # Built-in functions of torch have no module at all.
    return module.split(".")[0] in ("torch", "_operator", "builtins", "")


def _name(n: fx.Node) -> str:
    return n.target if isinstance(n.target, str) else getattr(n.target, "__name__", str(n.target))


def _is_box(value: object) -> bool:
    return isinstance(value, Box)


def _flat(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for one in value:
            yield from _flat(one)
    else:
        yield value


def _unknown(n: fx.Node, what: str) -> str:
    place = (
        f"layer {n.target.removeprefix('inner.')} is"
        if n.op == "call_module" and isinstance(n.target, str)
        else "there is"
    )
    return (
        f"interval: {place} {what}, whose bounds are not known; use other layers, or randomized_smoothing, which only "
        "calls the model"
    )
