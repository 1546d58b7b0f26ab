"""A quantized model, and the surrogate with its values and usable gradients that attacks take in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from robustkit.models.onnx_model import OnnxModel
from robustkit.models.program import Program, as_graph
from robustkit.models.quantization import Quantization

__all__ = ["Quantization", "Quantized", "made_of", "round_trip", "surrogate_of"]
_BYTES = torch.ops.quantized_decomposed


class _RoundTrip(torch.autograd.Function):
    """To the grid and back; on the way back the identity, also where values were clipped (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, zero: int, low: int, high: int) -> Tensor:  # noqa: ANN401
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # noqa: ANN401
        return gradient, None, None, None, None


def round_trip(x: Tensor, scale: float, zero: int, low: int, high: int) -> Tensor:
    """Return x rounded to the grid of `low` to `high` steps of `scale` from `zero`, with the identity's gradient."""
    rounded: Tensor = _RoundTrip.apply(x, scale, zero, low, high)
    return rounded


class Quantized(nn.Module):
    """A quantized model: bytes for weights, activations rounded to bytes. Its answers have no gradient.

    `surrogate` computes the same bit for bit with straight-through gradients (Athalye et al. 2018, arXiv 1802.00420,
    section 4.1; Bengio et al. 2013, arXiv 1308.3432): what attacks take. On the CPU both simulate the arithmetic of
    bytes in floats, which is slower than the float model; `robustkit.compress.lowering.lowered` gives the fast form.
    """

    def __init__(self, program: Program, tensors: Mapping[str, Tensor], made: Quantization) -> None:
        super().__init__()
        self.program, self.made = program, made
        self.artefact = as_graph(program, tensors)
        self.surrogate = surrogate_of(self.artefact)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        logits: Tensor = self.artefact(x)
        return logits

    def view(self) -> nn.Module:
        """Return what attacks take in its place."""
        return self.surrogate

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of its file by name."""
        return dict(self.artefact.named_parameters())

    def weights(self) -> dict[str, Tensor]:
        """Return the int8 weights by name."""
        return {name: value for name, value in self.tensors().items() if value.dtype == torch.int8}


def surrogate_of(artefact: fx.GraphModule) -> fx.GraphModule:
    """Return a graph with the values of a quantized one whose roundings have the identity's gradient.

    Weights come as floats already, which no attack has to wait for.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(artefact.graph, copies))
    root = nn.Module()
    for name, value in artefact.named_parameters():
        root.register_parameter(name, value)
    for node in list(graph.nodes):
        if node.target is _BYTES.dequantize_per_tensor.default:
            _replace_round_trip(graph, node)
        elif node.target is _BYTES.dequantize_per_channel.default:
            _replace_weight(graph, node, root)
    graph.eliminate_dead_code()
    return fx.GraphModule(root, graph)


def _replace_round_trip(graph: fx.Graph, node: fx.Node) -> None:
    before = node.args[0]
    if not isinstance(before, fx.Node) or before.target is not _BYTES.quantize_per_tensor.default:
        return
    with graph.inserting_before(node):
        rounded = graph.call_function(round_trip, before.args[:5])
    node.replace_all_uses_with(rounded)
    graph.erase_node(node)


def _replace_weight(graph: fx.Graph, node: fx.Node, root: nn.Module) -> None:
    parts: list[Any] = [getattr(root, str(one.target)) if isinstance(one, fx.Node) else one for one in node.args]
    if parts[0].is_meta:
        return
    name = f"{node.args[0]}_floats"
    root.register_buffer(name, _BYTES.dequantize_per_channel.default(*parts), persistent=False)
    with graph.inserting_before(node):
        weight = graph.get_attr(name)
    node.replace_all_uses_with(weight)
    graph.erase_node(node)


def made_of(model: nn.Module) -> dict[str, Any] | None:
    """Return how a model was quantized, as plain values; None for one that is not."""
    made = model.made if isinstance(model, Quantized | OnnxModel) else None
    return None if made is None else made.model_dump()
