"""What a model costs: parameters, non-zeros, bytes, MACs, activations. Measured, never derived from a sparsity."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from robustkit.compress.latency import measure_latency
from robustkit.compress.masks import prunable
from robustkit.compress.memory import peak_activation_bytes
from robustkit.models.onnx_model import OnnxModel
from robustkit.models.quantized import Quantized
from robustkit.results import LayerSparsity

__all__ = ["Costs", "count_macs", "measure_costs", "measure_latency"]
GZIP_LEVEL = 6


@dataclass(frozen=True)
class Costs:
    """Size and work of one model; `macs` are multiply-accumulates of convolutions and linear layers an image.

    `activation_bytes`: the most that one image's forward holds at once (`peak_activation_bytes`);
    None of a quantized model, which PyTorch simulates in floats, and of an ONNX file. `channels`: output
    channels of convolutions and linear layers, of which `zero_channels` have no weight left.
    """

    parameters: int
    nonzero: int
    bytes: int
    gzip_bytes: int
    macs: int
    activation_bytes: int | None
    channels: int
    zero_channels: int
    sparsity: float
    layers: list[LayerSparsity]


def measure_costs(model: nn.Module, shape: tuple[int, int, int], artefact: Path) -> Costs:
    """Return the costs of a model whose file is `artefact`; sparsity is over convolution and linear weights."""
    raw = artefact.read_bytes()
    weights = list(model.weights().items() if isinstance(model, Quantized | OnnxModel) else prunable(model))
    layers = [LayerSparsity(name=name, size=weight.numel(), zeros=int((weight == 0).sum())) for name, weight in weights]
    total = sum(layer.size for layer in layers)
    parameters = list(model.parameters())
    return Costs(
        parameters=sum(parameter.numel() for parameter in parameters),
        nonzero=sum(int((parameter != 0).sum()) for parameter in parameters),
        bytes=len(raw),
        gzip_bytes=gzip_size(raw),
        macs=count_macs(model.view() if isinstance(model, OnnxModel) else model, shape),
        activation_bytes=None if isinstance(model, Quantized | OnnxModel) else peak_activation_bytes(model, shape),
        channels=sum(len(weight) for _, weight in weights),
        zero_channels=sum(int((weight == 0).flatten(1).all(1).sum()) for _, weight in weights),
        sparsity=sum(layer.zeros for layer in layers) / total if total else 0.0,
        layers=layers,
    )


def gzip_size(raw: bytes) -> int:
    """Return the bytes that a file's content takes after gzip."""
    return len(zlib.compress(raw, GZIP_LEVEL))


def count_macs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Return the multiply-accumulates of one image: half the operations that torch's counter counts."""
    counter = FlopCounterMode(display=False)
    device = next(model.parameters()).device
    with torch.no_grad(), counter:
        model(torch.zeros(1, *shape, device=device))
    return int(counter.get_total_flops()) // 2
