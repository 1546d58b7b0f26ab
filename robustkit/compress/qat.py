"""Training with fake quantization, as a hook beside the variant's defenses: adversarial training included."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustkit.models.fake_quantized import _Fake, put_fakes, take_fakes
from robustkit.train.hooks import Defense

BATCH = 64


class FakeQuantization(Defense):
    """Round weights and inputs of every layer in the forward pass; gradients go through as if nothing were rounded.

    Quantization-aware training (Jacob et al. 2018, arXiv 1712.05877, section 3) with the straight-through estimator of
    Bengio et al. 2013 (arXiv 1308.3432), clipped values included: the attacks inside the training see through the
    rounding as those after it do. images() gives training images (N, C, H, W), for the first ranges of activations.
    """

    def __init__(self, bits: int, images: Callable[[], Tensor]) -> None:
        self.bits, self._images = bits, images

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Put the rounding in, with ranges as the untrained model has them."""
        put_fakes(model, self.bits)
        watch(model, self._images())
        return model

    def restore_model(self, model: nn.Module) -> nn.Module:
        """Take the rounding out; the model keeps the ranges."""
        return take_fakes(model)


@torch.no_grad()
def watch(model: nn.Module, images: Tensor) -> None:
    """Take the ranges of the layers' inputs from images (N, C, H, W), with everything else in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for module in model.modules():
            if isinstance(module, _Fake):
                module.training = True
        for x in images.split(BATCH):
            model(x)
    finally:
        for module, training in modes:
            module.training = training
