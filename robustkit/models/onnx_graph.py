"""An ONNX file as a PyTorch module: the same values, with gradients that pass its roundings straight through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robustkit.errors import ModelError
from robustkit.models.onnx_ops import OPERATIONS

if TYPE_CHECKING:
    from onnx import ModelProto

WEIGHTED = {"Conv": 1, "Gemm": 1, "MatMul": 1}
"""Operations with weights, and which of their inputs these are."""
IMAGE, LOGITS = "image", "logits"
MAX_VALUES = 2**28
"""So many values may an operation give, and all together that depend on no image."""


class OnnxGraph(nn.Module):
    """Computes what an ONNX file describes. Rounding to bytes has the identity's gradient.

    What depends on no image is computed once: weights that the file holds as bytes are floats here.

    Raises:
        ModelError: the file has an operation that is not known here, outer data, or other inputs than images.
    """

    def __init__(self, proto: ModelProto) -> None:
        super().__init__()
        check_proto(proto)
        self.steps: list[tuple[str, dict[str, Any], list[str], str]] = []
        known = _initializers(proto)
        folded = 0
        for node in proto.graph.node:
            given = {one.name: _attribute(one) for one in node.attribute}
            if node.op_type == "Constant":
                known[node.output[0]] = given["value"]
            elif all(name in known or not name for name in node.input):
                constants = [known.get(name) for name in node.input]
                folded += _size(node.op_type, given, constants).numel()
                if folded > MAX_VALUES:
                    raise ModelError(f"the ONNX file computes {folded:,} values from no image, which is absurd")
                known[node.output[0]] = _run(node.op_type, given, constants)
            else:
                self.steps.append((node.op_type, given, list(node.input), node.output[0]))
        self._keep(known)

    def _keep(self, known: dict[str, Tensor]) -> None:
        """Take over the constants that are needed: those with weights as parameters, the others as buffers."""
        trained = {
            name
            for kind, _, inputs, _ in self.steps
            if kind in WEIGHTED or kind == "BatchNormalization"
            for name in inputs[1:]
        }
        self.constants: dict[str, str] = {}
        for number, name in enumerate(sorted({one for _, _, inputs, _ in self.steps for one in inputs} & set(known))):
            self.constants[name] = place = f"c{number}_{name.replace('.', '_')}"
            value = known[name].contiguous()
            if name in trained and value.is_floating_point():
                self.register_parameter(place, nn.Parameter(value, requires_grad=False))
            else:
                self.register_buffer(place, value)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        values: dict[str, Tensor] = {name: getattr(self, place) for name, place in self.constants.items()}
        values[IMAGE] = x
        for kind, given, inputs, output in self.steps:
            values[output] = _run(kind, given, [values.get(name) for name in inputs])
        return values[LOGITS]

    def check_size(self, shape: tuple[int, int, int]) -> None:
        """Raise a ModelError where images (C, H, W) would become absurdly large in between; nothing is allocated."""
        values: dict[str, Tensor] = {name: getattr(self, place) for name, place in self.constants.items()}
        values[IMAGE] = torch.empty(2, *shape, device="meta")
        for kind, given, inputs, output in self.steps:
            values[output] = _size(kind, given, [values.get(name) for name in inputs])

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of convolutions and linear layers by their names in the file."""
        names = [
            inputs[WEIGHTED[kind]]
            for kind, _, inputs, _ in self.steps
            if kind in WEIGHTED and inputs[WEIGHTED[kind]] in self.constants
        ]
        return {name: getattr(self, self.constants[name]) for name in dict.fromkeys(names)}


def check_proto(proto: ModelProto) -> None:
    """Raise a ModelError where a file has what is not known here, data outside of it, or other inputs than images."""
    from onnx import TensorProto

    graph = proto.graph
    if proto.functions:
        raise ModelError("the ONNX file defines functions of its own, which are not read")
    odd = sorted(
        {
            f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            for node in graph.node
            if node.domain not in ("", "ai.onnx") or node.op_type not in (*OPERATIONS, "Constant")
        }
    )
    if odd:
        raise ModelError(f"the ONNX file has operations that have no gradient here: {', '.join(odd)}")
    if any(one.data_location == TensorProto.EXTERNAL for one in graph.initializer) or graph.sparse_initializer:
        raise ModelError("the ONNX file keeps data outside of itself, which is not read")
    given = {one.name for one in graph.initializer}
    inputs = [one.name for one in graph.input if one.name not in given]
    outputs = [one.name for one in graph.output]
    if (inputs, outputs) != ([IMAGE], [LOGITS]):
        raise ModelError(f"an ONNX file takes `image` and gives `logits`, not {inputs} and {outputs}")
    if any(sum(bool(name) for name in node.output) != 1 for node in graph.node):
        raise ModelError("the ONNX file has an operation with more than one output")


def _initializers(proto: ModelProto) -> dict[str, Tensor]:
    from onnx import numpy_helper

    # A copy: what onnx gives may be read-only.
    return {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in proto.graph.initializer}


def _attribute(one: Any) -> Any:  # noqa: ANN401
    from onnx import TensorProto, helper, numpy_helper

    value = helper.get_attribute_value(one)
    if not isinstance(value, TensorProto):
        return value
    if value.data_location == TensorProto.EXTERNAL:
        raise ModelError("the ONNX file keeps data outside of itself, which is not read")
    return torch.from_numpy(numpy_helper.to_array(value).copy())


def _size(kind: str, given: dict[str, Any], inputs: list[Tensor | None]) -> Tensor:
    """Return what an operation gives on the meta device.

    Raises:
        ModelError: it is absurdly large, or the operation does not fit its inputs.
    """
    # Shapes and axes are 64-bit integers, and are needed as values.
    sizes = [one if one is None or one.dtype == torch.int64 else one.to("meta") for one in inputs]
    try:
        found = _run(kind, given, sizes)
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ModelError(f"the ONNX file's {kind} does not fit its inputs: {first}") from error
    if found.numel() > MAX_VALUES:
        raise ModelError(f"the ONNX file's {kind} gives {found.numel():,} values for two images, which is absurd")
    return found


def _run(kind: str, given: dict[str, Any], inputs: list[Tensor | None]) -> Tensor:
    return OPERATIONS[kind](given, inputs)
