"""Features of a small network that is trained on the data at hand: what data filters look at."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustkit.data.batches import epoch_order, training_batches
from robustkit.data.split import Split
from robustkit.models.small_cnn import SmallCnn
from robustkit.seeding import derive_seed

WIDTHS = [16, 32, 32]
EPOCHS = (3, 10)
"""At least and at most so many."""
STEPS = 700
"""Few images get more epochs, to come to so many steps: before, a backdoor's features do not part from its class."""
BATCH = 128
PEAK = 0.05


class Probe:
    """Trains a small CNN on first use and returns its last hidden features."""

    def __init__(self, train: Split, classes: int, device: torch.device, seed: int) -> None:
        self._train = train
        self._classes = classes
        self._device = device
        self._seed = seed
        self._model: SmallCnn | None = None

    def __call__(self, split: Split) -> Tensor:
        """Return features (N, D) of a split, on the CPU."""
        model = self.model
        found = []
        with torch.no_grad():
            for start in range(0, len(split), 500):
                x = split.images[start : start + 500].to(self._device).to(torch.float32).div_(255)
                found.append(model.pool(model.groups(x)).flatten(1))
        return torch.cat(found).cpu()

    @property
    def model(self) -> SmallCnn:
        """The network itself, in eval mode."""
        if self._model is None:
            self._model = self._trained()
        return self._model.eval()

    def _trained(self) -> SmallCnn:
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self._seed, "init"))
            model = SmallCnn(self._train.shape, self._classes, WIDTHS).to(self._device)
        optimizer = torch.optim.SGD(model.parameters(), lr=PEAK, momentum=0.9)
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "order"))
        each = -(-len(self._train) // BATCH)
        epochs = min(max(EPOCHS[0], -(-STEPS // each)), EPOCHS[1])
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=epochs * each + 1)
        for _ in range(epochs):
            order = epoch_order(len(self._train), generator)
            for x, y, _ in training_batches(self._train, order, BATCH, self._device, (), generator):
                _step(model, optimizer, x, y)
                schedule.step()
        return model


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    model.train()
    optimizer.zero_grad(set_to_none=True)
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
