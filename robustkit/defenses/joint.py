"""Several trained models that answer together: the mean of their probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from robustkit.defenses.sampled import mean_answer
from robustkit.errors import ModelError, UsageError
from robustkit.models.wrapped import has_view, view_of
from robustkit.params import Labels
from robustkit.train.hooks import Defense


class Joint(nn.Module):
    """Models of the same classes whose probabilities are averaged; the output (N, classes) is their mean's logarithm.

    Raises:
        ModelError: when asked, and the models differ in how many classes they know.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W)."""
        return mean_answer(self.answers(x))

    def answers(self, x: Tensor) -> list[Tensor]:
        """Return the logits (N, classes) of each member."""
        found = [member(x) for member in self.members]
        if len({logits.shape for logits in found}) > 1:
            sizes = ", ".join(str(logits.shape[-1]) for logits in found)
            raise ModelError(f"ensemble: its members know {sizes} classes; all must know the same ones")
        return found


@dataclass
class Ensemble(Defense):
    """Let other variants answer together with this one: the mean of all their probabilities; nothing is trained.

    members: labels of variants of the recipe, as deployed. Costs a pass through each model. The mean is differentiable,
    so attacks follow its own gradient (He et al. 2017); where members are wrapped, also that of their adaptive views.
    """

    members: Labels

    def __post_init__(self) -> None:
        """Refuse an ensemble of nobody."""
        if not self.members:
            raise UsageError("ensemble: members is empty; name one variant or more, e.g. members: [n-fgsm]")
        self._models: tuple[nn.Module, ...] = ()

    def take_members(self, members: Sequence[nn.Module]) -> None:
        """Take the trained models that `members` names, in that order.

        Raises:
            UsageError: they are not as many.
        """
        if len(members) != len(self.members):
            raise UsageError(f"ensemble: {len(self.members)} members are named, {len(members)} models given")
        self._models = tuple(members)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model and the members, answering together.

        Raises:
            UsageError: it has no members' models yet.
        """
        if not self._models:
            raise UsageError(
                "ensemble: its members' models are not there; call take_members(models) first, or name variants of a "
                "recipe"
            )
        return Joint([model, *self._models])

    def attack_view(self, wrapped: nn.Module) -> nn.Module:
        """Return the mean answer of the members' own views; what was given where no member has one."""
        if not isinstance(wrapped, Joint):
            raise UsageError(f"attack_view takes what wrap returned, not a {type(wrapped).__name__}")
        if not any(has_view(one) for one in wrapped.members):
            return wrapped
        return Joint([view_of(one) if has_view(one) else one for one in wrapped.members])
