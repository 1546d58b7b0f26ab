"""A traced graph as plain data: operations from a list, their arguments, names of tensors. Nothing in it is code."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, fx, nn

# Registers the operations that take a tensor to bytes and back.
from torch.ao.quantization.fx import _decomposed as _decomposed

from robustkit.errors import ModelError

LARGEST = 2**28
"""So many numbers may a tensor have for one image."""
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
ATEN = """
    _softmax.default adaptive_avg_pool2d.default adaptive_max_pool2d.default add.Tensor add_.Tensor amax.default
    avg_pool2d.default batch_norm.default bmm.default cat.default chunk.default clamp.default clone.default
    contiguous.default conv1d.default conv2d.default conv2d.padding conv_transpose2d.input div.Tensor div_.Tensor
    elu.default elu_.default exp.default expand.default flatten.using_ints gelu.default group_norm.default
    hardsigmoid.default hardsigmoid_.default hardswish.default hardswish_.default hardtanh.default hardtanh_.default
    layer_norm.default leaky_relu.default leaky_relu_.default linear.default log.default log_softmax.int
    matmul.default max_pool2d.default mean.dim mish.default mul.Tensor mul_.Tensor neg.default pad.default
    permute.default pow.Tensor_Scalar relu.default relu6.default relu_.default reshape.default rsqrt.default
    rsub.Scalar scaled_dot_product_attention.default select.int sigmoid.default sigmoid_.default silu.default
    silu_.default slice.Tensor softmax.int softplus.default split.Tensor split_with_sizes.default sqrt.default
    squeeze.default squeeze.dim stack.default sub.Tensor sum.dim_IntList sym_size.int tanh.default to.dtype
    transpose.int unbind.int unflatten.int unsqueeze.default view.default
"""
BYTES = "quantize_per_tensor.default dequantize_per_tensor.default dequantize_per_channel.default"
PLAIN: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "add": operator.add,
    "mul": operator.mul,
    "sub": operator.sub,
    "floordiv": operator.floordiv,
}
DTYPES = {"uint8": torch.uint8, "int8": torch.int8, "float32": torch.float32, "int64": torch.int64}
IGNORED = frozenset({"_guards_fn"})
"""Calls that look at the input and change nothing."""


def _table() -> dict[str, Callable[..., Any]]:
    found = dict(PLAIN)
    for space, names in ((torch.ops.aten, ATEN), (torch.ops.quantized_decomposed, BYTES)):
        for name in names.split():
            packet, _, overload = name.partition(".")
            found[name] = getattr(getattr(space, packet), overload)
    return found


TABLE = _table()
NAMES = {function: name for name, function in TABLE.items()}


class Call(BaseModel):
    """One operation; arguments are numbers, texts, lists, and `{"of": kind, "is": ...}` for what those cannot say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    op: str
    args: tuple[Any, ...] = ()
    named: dict[str, Any] = {}


class Program(BaseModel):
    """What a model computes of images: the calls in their order; the last one's result are the logits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calls: tuple[Call, ...] = Field(min_length=1, max_length=100_000)


def as_program(module: fx.GraphModule) -> tuple[Program, dict[str, Tensor]]:
    """Return a traced graph of one input and one output as plain data, and its tensors by name.

    Raises:
        ModelError: an operation that is not in the list.
    """
    writer = _Writer(module)
    output = None
    for node in module.graph.nodes:
        if node.op == "output":
            output = node.args[0][0] if isinstance(node.args[0], tuple | list) else node.args[0]
        else:
            writer.add(node)
    if output is not writer.last:
        raise ModelError("int8: the model's last operation does not give its logits; return one tensor")
    return Program(calls=tuple(writer.calls)), writer.tensors


class _Writer:
    """Turns nodes into calls, one after another."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.calls: list[Call] = []
        self.tensors: dict[str, Tensor] = {}
        self.last: fx.Node | None = None
        self._names: dict[str, str] = {}
        self._module = module
        self._known: dict[fx.Node, dict[str, Any]] = {}

    def add(self, node: fx.Node) -> None:
        """Take in a node that is no output."""
        if node.op == "placeholder":
            if any(one["of"] == "input" for one in self._known.values()):
                raise ModelError("int8: the model takes more than one input")
            self._known[node] = {"of": "input"}
        elif node.op == "get_attr":
            self._known[node] = {"of": "tensor", "is": self._tensor(str(node.target))}
        elif node.op == "call_function" and node.target in NAMES:
            named = {key: self._plain(value) for key, value in node.kwargs.items() if value is not None}
            self.calls.append(
                Call(op=NAMES[node.target], args=tuple(self._plain(one) for one in node.args), named=named)
            )
            self._known[node] = {"of": "call", "is": len(self.calls) - 1}
            self.last = node
        elif not (node.op == "call_module" and str(node.target).rpartition(".")[2] in IGNORED):
            raise ModelError(f"int8: a quantized model's file cannot hold {node.target}; drop int8, or that operation")

    def _tensor(self, target: str) -> str:
        value: Any = self._module
        for part in target.split("."):
            value = getattr(value, part)
        name = re.sub(r"[^A-Za-z0-9]|^(?=[0-9])", "_", target)
        while self._names.setdefault(name, target) != target:
            name += "_"
        self.tensors[name] = value.detach()
        return name

    def _plain(self, value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, fx.Node):
            return self._known[value]
        if isinstance(value, list | tuple):
            return [self._plain(one) for one in value]
        if isinstance(value, torch.dtype):
            return {"of": "dtype", "is": str(value).removeprefix("torch.")}
        if isinstance(value, bool | int | float | str) or value is None:
            return value
        # Layouts and devices: those that a tensor has by itself.
        if isinstance(value, torch.device | torch.layout | torch.memory_format):
            return None
        raise ModelError(f"int8: a quantized model's file cannot hold a {type(value).__name__}; drop int8")


def as_graph(program: Program, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """Return the graph that a program describes, on these tensors: the reverse of as_program.

    Raises:
        ModelError: an operation that is not in the list, a tensor or a result that is not there.
    """
    root = nn.Module()
    for name, value in tensors.items():
        if not NAME.fullmatch(name) or hasattr(root, name):
            raise ModelError(f"{name!r} cannot be the name of a tensor")
        # As parameters they are counted, and go wherever the model goes.
        root.register_parameter(name, nn.Parameter(value, requires_grad=False))
    graph = fx.Graph()
    reader = _Reader(graph, graph.placeholder("x"), {name: graph.get_attr(name) for name in tensors})
    for call in program.calls:
        reader.add(call)
    graph.output(reader.results[-1])
    module = fx.GraphModule(root, graph)
    return module


class _Reader:
    """Turns calls into nodes, one after another."""

    def __init__(self, graph: fx.Graph, image: fx.Node, tensors: Mapping[str, fx.Node]) -> None:
        self.results: list[fx.Node] = []
        self._graph, self._image, self._tensors = graph, image, tensors

    def add(self, call: Call) -> None:
        """Append a call to the graph."""
        if call.op not in TABLE:
            raise ModelError(f"{call.op!r} is no operation of a quantized model")
        args = tuple(self._value(one) for one in call.args)
        named = {key: self._value(one) for key, one in call.named.items()}
        self.results.append(self._graph.call_function(TABLE[call.op], args, named))

    def _value(self, value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, list | tuple):
            return [self._value(one) for one in value]
        if not isinstance(value, dict):
            return value
        kind, what = value.get("of"), value.get("is")
        if kind == "input":
            return self._image
        if kind == "tensor" and isinstance(what, str) and what in self._tensors:
            return self._tensors[what]
        if kind == "dtype" and what in DTYPES:
            return DTYPES[what]
        if kind == "call" and isinstance(what, int) and 0 <= what < len(self.results):
            return self.results[what]
        raise ModelError(f"call {len(self.results)} asks for {value}, which is not there")


class _Measured(fx.Interpreter):
    """Runs a graph and refuses tensors that are far too large."""

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401
        """Return what a node gives.

        Raises:
            ModelError: a tensor of absurd size.
        """
        found = super().run_node(n)
        for one in found if isinstance(found, list | tuple) else (found,):
            if isinstance(one, Tensor) and one.numel() > LARGEST:
                raise ModelError(f"{n.name} makes a tensor of {one.numel():,} numbers, which is absurd")
        return found


def check_program(program: Program, shapes: Mapping[str, Tensor], shape: tuple[int, int, int], classes: int) -> None:
    """Run a program without memory: `shapes` are its tensors on the meta device.

    Raises:
        ModelError: it does not make logits (N, classes) of images (N, *shape), or tensors of absurd size on the way.
    """
    try:
        graph = as_graph(program, shapes)
        with torch.no_grad():
            logits = _Measured(graph).run(torch.zeros(1, *shape, device="meta"))
    except ModelError:
        raise
    except Exception as error:  # what an operation raises that was given nonsense
        raise ModelError(f"its graph cannot be run: {str(error).strip().partition(chr(10))[0]}") from error
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (1, classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"its graph gives {got} for one image; (1, {classes}) is needed")
