"""Ensemble adversarial training: examples that other, frozen models gave are learned as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkit.data.batches import epoch_order, training_batches
from robustkit.data.split import Split
from robustkit.defenses.budget import require_norm, step_length, target_of, warmed
from robustkit.defenses.single_step import fgsm_rs_examples
from robustkit.models.small_cnn import SmallCnn
from robustkit.params import Fraction, PositiveFloat, PositiveInt
from robustkit.train.hooks import Batch, DataContext, Defense, Forward, Step

WIDTHS = ([16, 32, 32], [32, 32], [24, 48, 48], [48, 48])
"""Architectures of the sources, in turn."""
BATCH = 128
PEAK = 0.05


def ensemble_loss(clean: Tensor, adversarial: Tensor, target: Tensor, share: float) -> Tensor:
    """Return share * CE(clean, target) + (1 - share) * CE(adversarial, target) of each example (N,).

    clean, adversarial: logits (N, classes). target: labels (N,) or soft targets (N, classes).
    """
    natural = F.cross_entropy(clean.float(), target, reduction="none")
    attacked = F.cross_entropy(adversarial.float(), target, reduction="none")
    return share * natural + (1 - share) * attacked


def source_model(
    data: Split, widths: list[int], *, epochs: int, generator: torch.Generator, device: torch.device
) -> nn.Module:
    """Return a small CNN trained on a split without any defense, frozen and in eval mode on the device."""
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        model = SmallCnn(data.shape, int(data.labels.max()) + 1, widths).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK, momentum=0.9)
    steps = epochs * -(-len(data) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps + 1)
    draws = torch.Generator(device=device).manual_seed(int(torch.randint(2**31, (), generator=generator)))
    for _ in range(epochs):
        for x, y, _ in training_batches(data, epoch_order(len(data), generator), BATCH, device, (), draws):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    return model.requires_grad_(False).eval()


@dataclass
class EnsembleTraining(Defense):
    """Train on clean images and on single steps up other models' losses (Tramèr et al. 2018); linf or l2.

    Before training, `sources` small CNNs of different widths are trained on the training data for `epochs` epochs and
    frozen. Batch by batch the attacked model is one of them or the trained model itself, in turn; each attack is a
    step of alpha (by default eps) from a random start. clean is the clean images' share of the loss. warmup is the
    share of training over which eps grows from 0.
    """

    sources: PositiveInt = 3
    epochs: PositiveInt = 3
    clean: Fraction = 0.5
    alpha: PositiveFloat | None = None
    warmup: Fraction = 0.0

    def __post_init__(self) -> None:
        self._models: list[nn.Module] = []
        self._turn = 0

    def prepare_data(self, data: Split, context: DataContext) -> Split:
        """Train the sources on the data, which are left as they are."""
        self._models = [
            source_model(
                data,
                WIDTHS[number % len(WIDTHS)],
                epochs=self.epochs,
                generator=context.generator,
                device=context.device,
            )
            for number in range(self.sources)
        ]
        context.log(f"ensemble_training: {self.sources} source models trained", {"sources": self.sources})
        return data

    def perturb(self, batch: Batch, step: Step) -> Tensor:
        """Return the images (N, C, H, W) that one of the models gave, inside ball and box."""
        require_norm("ensemble_training", step.threat, ("linf", "l2"))
        threat, ramp = warmed(step, self.warmup)
        alpha = step_length("ensemble_training", self.alpha, 1.0, threat, ramp)
        models = [step.model, *self._models]
        attacked = models[self._turn % len(models)]
        self._turn += 1
        # The sources were trained on labels, and know no more classes than these.
        target = target_of(batch) if attacked is step.model else batch.y
        return fgsm_rs_examples(attacked, batch.x, target, threat, alpha=alpha, generator=step.generator)

    def objective(self, batch: Batch, forward: Forward, step: Step) -> Tensor:
        """Return the loss of each example (N,)."""
        return ensemble_loss(forward.clean(), forward.adversarial(), target_of(batch), self.clean)

    def ready(self, step: Step) -> bool:
        """Say that no checkpoint may be selected while eps still grows."""
        return step.progress >= self.warmup

    def state_dict(self) -> dict[str, Any]:
        """Return whose turn it is."""
        return {"turn": self._turn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back whose turn it is."""
        self._turn = int(state["turn"])
