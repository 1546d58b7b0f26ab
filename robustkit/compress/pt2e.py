"""Static quantization by torchao's PT2E flow with the quantizer for x86. The only place that imports torchao.

After Jacob et al. 2018 (arXiv 1712.05877): affine activations a tensor, symmetric weights a channel.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from robustkit.errors import ModelError, UsageError
from robustkit.models.fake_quantized import LEAST_SCALE, weight_levels

MAX_BATCH = 65_536
aten = torch.ops.aten
CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv_transpose2d.input, aten.linear.default})
DROPOUT = frozenset({aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default})


def require_torchao() -> None:
    """Raise a UsageError with what to install where torchao is not there."""
    if importlib.util.find_spec("torchao") is None:
        raise UsageError("int8 needs torchao: pip install 'robustkit[int8]'")


def register_kernels() -> None:
    """Let torch's inductor find the int8 kernels of quantized layers: importing the quantizer does it."""
    require_torchao()
    with _quiet_import():
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as _quantizer  # noqa: F401


def quantized_graph(
    model: nn.Module,
    shape: tuple[int, int, int],
    batches: Iterable[Tensor],
    bits: int = 8,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> fx.GraphModule:
    """Return the quantized graph of a plain model for any batch size; float weights that nothing uses are gone.

    batches: calibration images (N, C, H, W) in [0, 1]: activations get the range with the least squared error. bits: 8,
    of which weights take 7, or less on the same grid of bytes. ranges: of the inputs of layers by their names, as a
    training with fake quantization left them; all others are moving averages then, as in that training. The model is
    left alone.

    Raises:
        UsageError: torchao is not installed.
        ModelError: the model cannot be traced.
    """
    require_torchao()
    with _quiet_import():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

    plain = copy.deepcopy(model).cpu().eval()
    try:
        graph = _exported(plain, shape)
        _without_dropout(graph)
        _without_lone_norms(graph)
        quantizer = X86InductorQuantizer().set_global(_config(bits, averaged=ranges is not None))
        prepared = prepare_pt2e(graph, quantizer)
        with torch.no_grad():
            for x in batches:
                prepared(x.cpu())
        _set_ranges(prepared, ranges or {})
        converted: fx.GraphModule = convert_pt2e(prepared)
    except (UsageError, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # the tracer raises whatever an operation of the model does
        first = str(error).strip().partition("\n")[0]
        raise ModelError(f"int8: the model cannot be quantized: {type(error).__name__}: {first}") from error
    _drop_unused(converted)
    return converted


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Keep torch from logging, on import, that torchao uses a call of torch's that is to go."""
    log = logging.getLogger("torch.utils._pytree")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _exported(model: nn.Module, shape: tuple[int, int, int]) -> fx.GraphModule:
    # Zeros, never real images, which an exported program keeps; two, since with one the batch would be a constant.
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    # Strict: a module that is called twice, as ReLU often is, has no partition of its own otherwise.
    program = torch.export.export(model, (torch.zeros(2, *shape),), dynamic_shapes=({0: batch},), strict=True)
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    return module


def _config(bits: int, *, averaged: bool) -> Any:  # noqa: ANN401
    """Return what a layer's input and weight are rounded to, in bytes: so many bits, weights `weight_levels`."""
    from torchao.quantization.pt2e.observer import (
        HistogramObserver,
        MovingAverageMinMaxObserver,
        PerChannelMinMaxObserver,
    )
    from torchao.quantization.pt2e.quantizer import QuantizationSpec
    from torchao.quantization.pt2e.quantizer.utils import QuantizationConfig

    observer = MovingAverageMinMaxObserver if averaged else HistogramObserver
    activation = QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=2**bits - 1,
        qscheme=torch.per_tensor_affine,
        is_dynamic=False,
        observer_or_fake_quant_ctr=observer.with_args(eps=LEAST_SCALE),
    )
    low, high = weight_levels(bits)
    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        is_dynamic=False,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=LEAST_SCALE),
    )
    return QuantizationConfig(activation, activation, weight, None, False)


def _set_ranges(prepared: fx.GraphModule, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Give the observers of layers' inputs these ranges; the layer is told by the name of its weight."""
    for node in prepared.graph.nodes:
        if node.target not in CONVOLUTIONS:
            continue
        name, observer = _origin(node.args[1]), node.args[0]
        if name in ranges and observer.op == "call_module":
            watcher = prepared.get_submodule(str(observer.target))
            for bound, value in zip(("min_val", "max_val"), ranges[name], strict=True):
                setattr(watcher, bound, torch.tensor(value))


def _origin(weight: Any) -> str:  # noqa: ANN401
    """Return the name of the layer whose weight a node gives, through the weight's own observer."""
    while isinstance(weight, fx.Node) and weight.op != "get_attr":
        weight = weight.args[0] if weight.args else None
    return str(weight.target).rpartition(".")[0] if isinstance(weight, fx.Node) else ""


def _without_dropout(module: fx.GraphModule) -> None:
    """Take out dropout, which does nothing at inference."""
    for node in list(module.graph.nodes):
        if node.target in DROPOUT:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.recompile()


def _without_lone_norms(module: fx.GraphModule) -> None:
    """Put a product and a sum in the place of each batch norm that no convolution right before it can take in.

    They compute the same; torchao would look for training patterns as long as there is a batch norm, which takes long.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is not aten.batch_norm.default or _foldable(node):
            continue
        x, weight, bias, mean, var, _, _, eps, _ = node.args
        mean, var = _value(module, mean), _value(module, var)
        scale = (var + eps).rsqrt() if weight is None else _value(module, weight) * (var + eps).rsqrt()
        shift = -mean * scale if bias is None else _value(module, bias) - mean * scale
        dims = node.meta["val"].dim()
        with graph.inserting_before(node):
            factor = _constant(module, f"{node.name}_scale", scale, dims)
            offset = _constant(module, f"{node.name}_shift", shift, dims)
            product = graph.call_function(aten.mul.Tensor, (x, factor))
            total = graph.call_function(aten.add.Tensor, (product, offset))
        product.meta, total.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(total)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()


def _foldable(node: fx.Node) -> bool:
    before = node.args[0]
    return isinstance(before, fx.Node) and before.target in CONVOLUTIONS and len(before.users) == 1


def _value(module: fx.GraphModule, node: Any) -> Tensor:  # noqa: ANN401
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value.detach()


def _constant(module: fx.GraphModule, name: str, value: Tensor, dims: int) -> fx.Node:
    shaped = value.view(1, -1, *[1] * (dims - 2))
    module.register_buffer(name, shaped)
    node = module.graph.get_attr(name)
    node.meta["val"] = shaped
    return node


def _drop_unused(module: fx.GraphModule) -> None:
    """Remove tensors that no node reads: conversion keeps the float weights beside the bytes."""
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    named = [*module.named_parameters(), *module.named_buffers()]
    for name in [name for name, _ in named if name not in used]:
        parent, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(parent), leaf)
