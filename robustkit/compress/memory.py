"""Peak activation memory: the most bytes that one image's forward holds at once, counted and not sampled."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from robustkit.nested import tensors_in


def peak_activation_bytes(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Return the largest number of bytes alive at once in one image's forward, the image (C, H, W) float32 included.

    Counted are the storages that operations allocate, each once and until Python lets go of it: outputs, not views of
    what was there, weights and buffers not, nor what a kernel needs inside. Eager PyTorch in eval mode without
    gradients; the same model gives the same number on every machine.
    """
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    image = torch.zeros(1, *shape, device=device)
    try:
        with torch.no_grad(), LiveStorages(image) as live:
            model(image)
    finally:
        for module, mode in modes.items():
            module.training = mode
    peak: int = live.peak
    return peak


class LiveStorages(TorchDispatchMode):
    """Adds up the bytes of storages that operations make, for as long as they live."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = sum(one.untyped_storage().nbytes() for one in given)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run an operation and count what it allocates."""
        found = func(*args, **(kwargs or {}))
        before = {one.untyped_storage()._cdata for one in tensors_in([*args, *(kwargs or {}).values()])}
        for one in tensors_in([found]):
            storage = one.untyped_storage()
            if storage._cdata not in before:
                before.add(storage._cdata)
                size = storage.nbytes()
                self.bytes += size
                weakref.finalize(storage, self._gone, size)
        self.peak = max(self.peak, self.bytes)
        return found

    def _gone(self, size: int) -> None:
        self.bytes -= size
