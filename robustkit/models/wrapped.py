"""A plain model as it is deployed: behind the inference wrappers of its defenses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from robustkit.attacks.counting import CountedModel
from robustkit.models.onnx_model import OnnxModel
from robustkit.models.quantized import Quantized
from robustkit.train.hooks import Defense


class Wrapped(nn.Module):
    """A model behind its wrappers, the first of them next to the model.

    `plain` is the model alone; `deployed` answers; `view()` is what an adaptive attack attacks instead.
    """

    def __init__(self, plain: nn.Module, wrappers: Sequence[Defense]) -> None:
        super().__init__()
        self.plain, self.wrappers = plain, tuple(wrappers)
        deployed = plain
        for one in self.wrappers:
            deployed = one.wrap(deployed)
        self.deployed = deployed

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of the deployed model."""
        logits: Tensor = self.deployed(x)
        return logits

    def view(self) -> nn.Module:
        """Return the model with every wrapper replaced by its honest view, from the inside out."""
        return self._seen()[0]

    @property
    def transparent(self) -> bool:
        """Whether no wrapper hides anything: the view would be the deployed model itself."""
        return self._seen()[1]

    def _seen(self) -> tuple[nn.Module, bool]:
        seen = view_of(self.plain) if has_view(self.plain) else self.plain
        same = seen is self.plain
        for one in self.wrappers:
            wrapped = one.wrap(seen)
            seen = one.attack_view(wrapped)
            same = same and seen is wrapped
        return seen.eval(), same


def view_of(model: nn.Module) -> nn.Module:
    """Return what an adaptive attack on a model attacks: its view where it is wrapped, quantized or ONNX, else it."""
    if isinstance(model, Wrapped | Quantized | OnnxModel):
        return model.view()
    inner = getattr(model, "model", None)
    if isinstance(model, CountedModel) and isinstance(inner, Wrapped | Quantized | OnnxModel):
        return CountedView(model, inner.view())
    # What watches or translates a model has it as `model`.
    return view_of(inner) if isinstance(inner, nn.Module) else model


class CountedView(nn.Module):
    """The view of a counted model; its examples are counted there."""

    def __init__(self, counted: CountedModel, view: nn.Module) -> None:
        super().__init__()
        self.counted, self.view = counted, view

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the view."""
        return self.counted.count(x, self.view(x))


def has_view(model: nn.Module) -> bool:
    """Say whether attacks take something else than the model itself: it is wrapped, quantized, or ONNX."""
    return isinstance(model, Wrapped | Quantized | OnnxModel)


def without_gradient(model: nn.Module) -> bool:
    """Say whether a model's answers have no gradient, so that attacks on it as deployed cannot climb it."""
    return isinstance(model.plain if isinstance(model, Wrapped) else model, Quantized | OnnxModel)
