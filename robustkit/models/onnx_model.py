"""A model that is an ONNX file: ONNX Runtime answers, and a differentiable view is what attacks take in its place."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from robustkit.errors import ModelError, UsageError
from robustkit.models.onnx_graph import IMAGE, LOGITS, OnnxGraph
from robustkit.models.quantization import Quantization

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ARCHITECTURE, QUANTIZATION = "robustkit", "robustkit.quantization"
"""Keys of the file's metadata."""


def missing_onnx_packages() -> list[str]:
    """Return which packages of the extra `[onnx]` are not installed, without importing them."""
    return [one for one in ONNX_PACKAGES if importlib.util.find_spec(one) is None]


def require_onnx(what: str) -> None:
    """Raise a UsageError that says what to install where a package of the extra `[onnx]` is missing."""
    missing = missing_onnx_packages()
    if missing:
        raise UsageError(f"{what} needs {', '.join(missing)}: pip install 'robustkit[onnx]'")


class OnnxModel(nn.Module):
    """An ONNX file, float or quantized, run by ONNX Runtime on the CPU. Its answers have no gradient.

    `view()` computes the same in PyTorch from the file's own weights, scales and zero points, with gradients that pass
    roundings straight through (`OnnxGraph`). The two add in other orders, so that they agree closely and not bit for
    bit; the file judges what attacks on the view find. `made`: how it was quantized; None for a float one.

    Raises:
        UsageError: packages of the extra `[onnx]` are missing.
        ModelError: the bytes are no ONNX file, or one with operations that are not known here.
    """

    def __init__(self, data: bytes, made: Quantization | None = None) -> None:
        require_onnx("an ONNX model")
        super().__init__()
        self.data, self.made = data, made
        self.graph = OnnxGraph(parse(data)).eval()
        self._session: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W) in [0, 1].

        Raises:
            ModelError: x is no tensor but stands for one, as where torch.fx traces.
        """
        if not isinstance(x, Tensor):
            raise ModelError(f"an ONNX file runs on tensors; it cannot be traced with a {type(x).__name__}")
        if self._session is None:
            self._session = onnx_session(self.data)
        images = x.detach().to("cpu", torch.float32).contiguous().numpy()
        return torch.from_numpy(self._session.run([LOGITS], {IMAGE: images})[0]).to(x.device)

    def view(self) -> nn.Module:
        """Return what attacks take in its place."""
        return self.graph

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of convolutions and linear layers as floats, by name."""
        return self.graph.weights()

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxModel:
        # A session cannot be copied, and is made again where it is needed.
        return OnnxModel(self.data, self.made)


def parse(data: bytes) -> Any:  # noqa: ANN401
    """Return the protobuf of an ONNX file."""
    import onnx

    try:
        return onnx.load_from_string(data)
    except Exception as error:  # protobuf's own exceptions, whichever implementation is installed
        raise ModelError("not an ONNX file, or a truncated one") from error


def onnx_session(data: bytes) -> Any:  # noqa: ANN401
    """Return a session of ONNX Runtime on the CPU, with as many threads as torch has now.

    Raises:
        ModelError: ONNX Runtime does not take the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Its threads would go on spinning while another model runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions have no common base
        first = str(error).strip().partition("\n")[0]
        raise ModelError(f"ONNX Runtime does not take the file: {first}") from error


def with_metadata(model: OnnxModel, architecture: str) -> bytes:
    """Return the bytes of a model's file with its architecture (JSON) and how it was quantized in its metadata."""
    proto = parse(model.data)
    told = {ARCHITECTURE: architecture}
    if model.made is not None:
        told[QUANTIZATION] = model.made.model_dump_json()
    del proto.metadata_props[:]
    for key, value in told.items():
        proto.metadata_props.add(key=key, value=value)
    return bytes(proto.SerializeToString())


def onnx_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of an ONNX file.

    Raises:
        ModelError: not an ONNX file, or a truncated one.
    """
    require_onnx(str(path))
    try:
        return {one.key: one.value for one in parse(path.read_bytes()).metadata_props}
    except (ModelError, OSError) as error:
        raise ModelError(f"{path}: {error}") from error


def load_onnx(path: Path, classes: int, shape: tuple[int, int, int]) -> OnnxModel:
    """Return the model of an ONNX file that takes images (C, H, W) and tells so many classes apart.

    Raises:
        ModelError: broken, with operations that are not known here, data outside of it, or other images or classes.
    """
    told = onnx_metadata(path)
    try:
        made = Quantization.model_validate_json(told[QUANTIZATION]) if QUANTIZATION in told else None
        model = OnnxModel(path.read_bytes(), made)
        model.graph.check_size(shape)
        with torch.no_grad():
            given = model(torch.zeros(2, *shape))
    except (ModelError, ValidationError) as error:
        raise ModelError(f"{path}: {error}") from error
    except Exception as error:  # onnxruntime's own exceptions have no common base
        first = str(error).strip().partition("\n")[0]
        raise ModelError(f"{path}: does not run on images of shape {shape}: {first}") from error
    if tuple(given.shape) != (2, classes):
        raise ModelError(f"{path}: gives {tuple(given.shape[1:])} for an image, and names {classes} classes")
    return model.eval()
