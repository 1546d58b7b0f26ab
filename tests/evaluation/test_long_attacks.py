"""Attacks that take long: kept by whole batches, smaller batches where memory is short, the faster layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustkit.attacks.cascade import Cascade
from robustkit.attacks.gradient import Pgd
from robustkit.attacks.layout import attack_layout, laid_out
from robustkit.attacks.threat import Attack, Threat
from robustkit.evaluation import seen
from robustkit.evaluation.attacked import attack_outcome, clean_outcome
from robustkit.evaluation.outcome import Outcome
from robustkit.evaluation.seen import Checkpoint
from robustkit.models.small_cnn import SmallCnn
from robustkit.store import Partial, Store

CPU = torch.device("cpu")
THREAT = Threat("linf", 0.05)


class Stopped(Exception):
    """The machine goes down."""


def net() -> nn.Module:
    torch.manual_seed(0)
    return SmallCnn((2, 8, 8), classes=4, widths=(4, 8)).eval()


def images(count: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 2, 8, 8, generator=generator)
    with torch.no_grad():
        y = net()(x).argmax(1)
    return x, y


def attacked(attack: Attack, batch_size: int = 6, checkpoint: Checkpoint | None = None) -> Outcome:
    model, (x, y) = net(), images()
    clean = clean_outcome(model, x, y, batch_size=8, device=CPU)
    return attack_outcome(
        model,
        x,
        y,
        attack,
        THREAT,
        clean=clean,
        seed=0,
        label="it",
        batch_size=batch_size,
        device=CPU,
        keep=9,
        checkpoint=checkpoint,
    )


@dataclass
class Stops:
    """An attack that dies in its third batch."""

    attack: Attack
    seeded_by_example: bool = True
    batches: int = 0

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        self.batches += 1
        if self.batches == 3:
            raise Stopped
        return self.attack(model, x, y, threat, generator=generator)


@dataclass
class Short:
    """An attack on a machine that has memory for so many examples."""

    attack: Attack
    error: Exception
    fits: int = 5
    seeded_by_example: bool = True
    sizes: list[int] = field(default_factory=list)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.fits:
            raise self.error
        return self.attack(model, x, y, threat, generator=generator)


@pytest.mark.parametrize("attack", [Pgd(steps=3), Cascade("quick")])
def test_a_killed_attack_goes_on_and_gives_the_same(
    attack: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen, "SAVE_EVERY", 0.0)
    whole, partial = attacked(attack), Partial(Store(tmp_path), "key")
    with pytest.raises(Stopped):
        attacked(Stops(attack), checkpoint=partial)
    again = Stops(attack, batches=10)
    resumed = attacked(again, checkpoint=partial)
    assert again.batches == 12, "the two batches before the stop are not attacked again"
    assert np.array_equal(resumed.prediction, whole.prediction)
    assert np.array_equal(resumed.distance, whole.distance)
    assert (resumed.forwards, resumed.backwards) == (whole.forwards, whole.backwards)
    assert resumed.adversarial is not None
    assert whole.adversarial is not None
    assert torch.equal(resumed.adversarial, whole.adversarial)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", None])
def test_a_broken_checkpoint_starts_anew(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen, "SAVE_EVERY", 0.0)
    store = Store(tmp_path)
    partial = Partial(store, "key")
    if content is None:
        partial.save({"prediction": np.zeros(3), "counts": np.array([1, 2])})
    else:
        store.step("key").mkdir(parents=True)
        (store.step("key") / "partial.npz").write_bytes(content)
    assert np.array_equal(attacked(Pgd(steps=3), checkpoint=partial).correct, attacked(Pgd(steps=3)).correct)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: ...")],
)
def test_a_batch_too_big_for_the_memory_is_halved(error: Exception) -> None:
    attack = Short(Pgd(steps=3), error)
    outcome = attacked(attack, batch_size=16)
    assert attack.sizes == [16, 8, 4, 4, 4, 4, 4, 4]
    assert np.array_equal(outcome.correct, attacked(Pgd(steps=3), batch_size=4).correct)


def test_another_error_is_not_taken_for_a_full_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        attacked(Short(Pgd(steps=3), RuntimeError("shapes do not fit")), batch_size=16)


def test_one_example_too_big_for_the_memory_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        attacked(Short(Pgd(steps=3), torch.OutOfMemoryError("CUDA out of memory"), fits=0))


class Viewing(nn.Module):
    """A model that takes its maps for contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.head = nn.Linear(3 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        return torch.as_tensor(self.head(maps.view(len(x), -1)))


def test_layout_is_channels_last_only_where_the_model_takes_it() -> None:
    x, _ = images(3)
    assert attack_layout(net(), x) is torch.channels_last
    assert attack_layout(Viewing(), x) is torch.contiguous_format
    assert attack_layout(nn.Flatten(), x) is torch.contiguous_format
    assert attack_layout(net(), x.flatten(1)) is torch.contiguous_format


@pytest.mark.parametrize("channels", [1, 2])
def test_laid_out_images_are_channels_last_with_the_gradient_through(channels: int) -> None:
    x = torch.rand(2, channels, 4, 4, requires_grad=True)
    y = laid_out(x, torch.channels_last)
    assert y.stride(1) == 1
    assert y.stride(3) == channels
    assert torch.equal(y, x)
    (gradient,) = torch.autograd.grad((y * 2).sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 2))


def test_attacks_see_channels_last_and_the_last_word_is_in_plain_layout() -> None:
    model, (x, y) = net(), images(6)
    strides: list[bool] = []
    model.register_forward_pre_hook(lambda _, inputs: strides.append(inputs[0].stride(1) == 1))
    clean = clean_outcome(model, x, y, batch_size=8, device=CPU)
    strides.clear()
    attack_outcome(model, x, y, Pgd(steps=2), THREAT, clean=clean, seed=0, label="it", batch_size=8, device=CPU)
    assert strides[:-1]
    assert all(strides[:-1])
    assert not strides[-1]
