"""Static quantization of an ONNX file by ONNX Runtime: bytes for weights per channel, and for activations."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from robustkit.errors import ModelError
from robustkit.models.onnx_model import parse

BATCH = 64
"""Calibration images at a time."""
NOT_BYTES = ("BatchNormalization",)
"""There are no kernels for it in bytes: its few weights would be rounded for nothing."""
FLOAT_OUT = ("Gemm", "MatMul")
"""Layers whose outputs stay floats: logits on a grid of bytes would tie."""


def to_int8(data: bytes, images: Tensor) -> bytes:
    """Return an ONNX file quantized in QDQ form: int8 weights per channel, uint8 activations, ranges by MinMax.

    images: (N, C, H, W) float32 in [0, 1], which give the ranges (Jacob et al. 2018, arXiv 1712.05877, section 3).
    Weights take 7 of their 8 bits: kernels for x86 without VNNI add pairs of products in 16 bits, and cut larger sums
    off, so that a file with whole bytes would answer otherwise there (ONNX Runtime, "Quantize ONNX models").

    Raises:
        ModelError: ONNX Runtime cannot quantize it.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.registry import QDQRegistry
    from onnxruntime.quantization.shape_inference import quant_pre_process

    kinds = [one for one in QDQRegistry if one not in NOT_BYTES]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        given, ready, made = (str(Path(folder) / name) for name in ("given.onnx", "ready.onnx", "made.onnx"))
        Path(given).write_bytes(data)
        try:
            quant_pre_process(given, ready, skip_symbolic_shape=True)
            quantize_static(
                ready,
                made,
                _reader(images),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=kinds,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                reduce_range=True,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={"OpTypesToExcludeOutputQuantization": list(FLOAT_OUT)},
            )
        except Exception as error:  # the quantizer raises whatever a node of the graph does
            first = str(error).strip().partition("\n")[0]
            raise ModelError(f"ONNX Runtime cannot quantize the model: {type(error).__name__}: {first}") from error
        return _stripped(Path(made).read_bytes())


def _stripped(data: bytes) -> bytes:
    """Return the file without the shapes in between, which every runtime works out itself."""
    proto = parse(data)
    del proto.graph.value_info[:]
    return bytes(proto.SerializeToString())


def _reader(images: Tensor) -> Any:  # noqa: ANN401
    """Return the images as ONNX Runtime reads them for calibration."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(images.cpu().split(BATCH))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"image": batch.numpy()}

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantizer's log lines from the terminal: they speak of its own code."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
