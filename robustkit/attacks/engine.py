"""How a model is run while it is attacked: in which memory layout and precision, compiled or not."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from robustkit.attacks.layout import attack_layout, laid_out
from robustkit.precision import autocast, has_bf16

GAIN = 1.2
"""So many times faster another way has to be: the noise of a clock must not decide, or a run would not repeat."""
TRIED = 64
"""Images of a trial."""
ROUNDS = 3


@dataclass(frozen=True)
class Allowed:
    """What the search may use. What it finds counts only if the model itself, in its own precision, agrees.

    precision: `auto` takes bfloat16 on a GPU that has it in hardware, where it measures faster, `bf16` wherever the
    model takes it, `fp32` never. compile: `torch.compile` is tried (a minute or two) and used where it measures faster.
    """

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False


@dataclass(frozen=True)
class Engine:
    """One way to run a model. `run`: the compiled model, or None for the model as it is."""

    layout: torch.memory_format = torch.contiguous_format
    precision: torch.dtype | None = None
    run: Callable[[Tensor], Tensor] | None = None

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the logits of images (N, ...)."""
        with autocast(images.device.type, self.precision):
            run = model if self.run is None else self.run
            logits: Tensor = run(laid_out(images, self.layout))
        return logits

    @property
    def exact(self) -> bool:
        """Whether it computes in the model's own precision."""
        return self.precision is None


PLAIN = Engine()
"""As the model's user runs it."""


def choose_engine(model: nn.Module, images: Tensor, allowed: Allowed) -> Engine:
    """Return the fastest allowed way to run a model in eval mode on images like these (N, ...), N > 0.

    Channels last is decided by the model; bfloat16 and compilation by what they measure on some of the images. What the
    model does not take is not used.
    """
    images = images[:TRIED]
    engine = Engine(attack_layout(model, images[:2]))
    if allowed.precision == "bf16" or (allowed.precision == "auto" and worth_bf16(images.device)):
        lower = replace(engine, precision=torch.bfloat16)
        if takes(model, images, lower) and (allowed.precision == "bf16" or faster(model, images, lower, engine)):
            engine = lower
    if allowed.compile:
        # Fooled examples leave at every step, so the batch has a new size at every step.
        compiled = replace(engine, run=torch.compile(model, dynamic=True))
        if takes(model, images, compiled) and faster(model, images, compiled, engine):
            engine = compiled
    return engine


def worth_bf16(device: torch.device) -> bool:
    """Say whether bfloat16 is worth a trial: on a GPU that has it in hardware.

    On a CPU that has it attacks were 1.3 to 1.4 times as fast: too little for a choice that is not kept to fall the
    same way in each run.
    """
    return device.type == "cuda" and has_bf16(device)


def takes(model: nn.Module, images: Tensor, engine: Engine) -> bool:
    """Say whether a model can be run this way, with a gradient where it has one."""
    try:
        one_pass(model, images, engine)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def faster(model: nn.Module, images: Tensor, one: Engine, other: Engine) -> bool:
    """Say whether one way is faster than another by more than a clock's noise; both in turns, the best of each."""
    best = {id(engine): float("inf") for engine in (one, other)}
    for _ in range(ROUNDS):
        for engine in (one, other):
            started = time.perf_counter()
            one_pass(model, images, engine)
            best[id(engine)] = min(best[id(engine)], time.perf_counter() - started)
    return best[id(one)] * GAIN <= best[id(other)]


def one_pass(model: nn.Module, images: Tensor, engine: Engine) -> None:
    """Do one forward and, where there is a gradient, one input-only backward, and wait for the device."""
    with torch.enable_grad():
        start = images.detach().clone().requires_grad_()
        total = engine(model, start).float().sum()
        if total.requires_grad:
            torch.autograd.grad(total, start, allow_unused=True)
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
