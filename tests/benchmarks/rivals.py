"""Trainings as tutorials and other libraries write them: what robustkit's recipes are timed against."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

from robustkit.data.split import Split

EPS, ALPHA, STEPS = 0.1, 0.025, 10


def plain_epoch(model: nn.Module, split: Split, batch: int) -> Callable[[], None]:
    """The document's loop: images, ToTensor, a DataLoader, SGD with lr 0.01 and no momentum, nothing else."""
    to_tensor = transforms.ToTensor()
    images = [Image.fromarray(one) for one in np.moveaxis(split.images.numpy(), 1, 3)]
    labels = split.labels.tolist()

    class Pictures(torch.utils.data.Dataset[tuple[Tensor, int]]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, number: int) -> tuple[Tensor, int]:
            tensor: Tensor = to_tensor(images[number])
            return tensor, labels[number]

    loader = DataLoader(Pictures(), batch_size=batch, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = nn.CrossEntropyLoss()

    def epoch() -> None:
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()

    return epoch


def tutorial_pgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """PGD as it is usually written: loss.backward(), which takes the weights' gradients too."""
    delta = torch.empty_like(x).uniform_(-EPS, EPS)
    delta.data = (x + delta).clamp(0, 1) - x
    for _ in range(STEPS):
        delta.requires_grad_()
        loss = nn.functional.cross_entropy(model(x + delta), y)
        loss.backward()
        assert delta.grad is not None
        delta = (delta.detach() + ALPHA * delta.grad.sign()).clamp(-EPS, EPS)
        delta = (x + delta).clamp(0, 1) - x
    return x + delta.detach()


def pgd_epoch(model: nn.Module, split: Split, batch: int) -> Callable[[], None]:
    """Madry's training in a tutorial's form: a DataLoader over tensors, PGD-10, Adam with its default rate."""
    data = TensorDataset(split.floats(0, len(split)), split.labels)
    loader: DataLoader[tuple[Tensor, ...]] = DataLoader(data, batch_size=batch, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters())

    def epoch() -> None:
        model.train()
        for x, y in loader:
            x_adv = tutorial_pgd(model, x, y)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x_adv), y).backward()
            optimizer.step()

    return epoch


def art_is_there() -> bool:
    """Say whether adversarial-robustness-toolbox is installed."""
    return importlib.util.find_spec("art") is not None


def art_epoch(model: nn.Module, split: Split, batch: int) -> Callable[[], None]:
    """ART's AdversarialTrainerMadryPGD at the same budget, step and number of steps, on Adam with its default rate."""
    from art.defences.trainer import AdversarialTrainerMadryPGD
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.Adam(model.parameters()),
        input_shape=tuple(split.images.shape[1:]),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    trainer = AdversarialTrainerMadryPGD(
        classifier, nb_epochs=1, batch_size=batch, eps=EPS, eps_step=ALPHA, max_iter=STEPS, num_random_init=1
    )
    x, y = split.floats(0, len(split)).numpy(), split.labels.numpy()

    def epoch() -> None:
        trainer.fit(x, y, nb_epochs=1, batch_size=batch)

    return epoch
