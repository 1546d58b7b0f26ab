"""One trained ResNet-18 pruned by torch.nn.utils.prune, by Torch-Pruning's pruner and by robustkit, side by side.

    python tests/benchmarks/compression.py --cifar ~/cifar10

From the same weights, with the same fine-tuning (epochs, batches, kind of adversarial images, learning rates), in one
process. `--cifar` is a folder of images (train/<class>/*, test/<class>/*).
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch as safetensors
import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from robustkit.attacks.gradient import Pgd
from robustkit.attacks.threat import Threat
from robustkit.compress.channels import channel_masks, classifier
from robustkit.compress.costs import count_macs, gzip_size, measure_latency
from robustkit.compress.masks import Masks
from robustkit.compress.prune import global_masks, magnitude_scores
from robustkit.compress.shrink import TOLERANCE, largest_difference, shrink
from robustkit.data.load import load_dataset
from robustkit.data.split import Dataset, Split, fixed_subset
from robustkit.evaluation.api import evaluate
from robustkit.models.artefact import save_model
from robustkit.models.build import build_model
from robustkit.recipe.spec import Use

CPU = torch.device("cpu")
THREAT = Threat("linf", 8 / 255)
Hold = Callable[[nn.Module], None]
"""What is done to a model after each step."""


@dataclass(frozen=True)
class Setup:
    """What all rows share."""

    data: Dataset
    use: Use
    ratio: float
    sparsity: float
    epochs: int
    lr: float

    @property
    def example(self) -> Tensor:
        """Two images of zeros."""
        return torch.zeros(2, *self.data.shape)


@dataclass(frozen=True)
class Pruned:
    """A finished model, its file's bytes, and what is worth saying of it."""

    model: nn.Module
    content: bytes
    note: str


def train(model: nn.Module, split: Split, epochs: int, lr: float, hold: Hold | None = None) -> nn.Module:
    """Train adversarially in place with one noisy gradient step (de Jorge et al. 2022, N-FGSM, arXiv 2202.01181)."""
    draw = torch.Generator().manual_seed(0)
    steps = epochs * -(-len(split) // 128)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(len(split), generator=draw).split(128):
            chosen = split.select(index)
            x, y = chosen.floats(0, len(chosen)), chosen.labels
            noisy = x + (2 * torch.rand(x.shape, generator=draw) - 1) * 2 * THREAT.eps
            noisy = noisy.detach().requires_grad_()
            model.eval()
            (gradient,) = torch.autograd.grad(functional.cross_entropy(model(noisy), y), noisy)
            attacked = (noisy + THREAT.eps * gradient.sign()).clamp(0, 1).detach()
            model.train()
            optimizer.zero_grad()
            functional.cross_entropy(model(attacked), y).backward()
            optimizer.step()
            schedule.step()
            if hold is not None:
                hold(model)
    return model.eval()


def state_bytes(model: nn.Module) -> bytes:
    """Return the file of a plain state dict."""
    return safetensors.save({name: value.contiguous().clone() for name, value in model.state_dict().items()})


def unpruned(setup: Setup, model: nn.Module) -> Pruned:
    """Train the parent on for as long as the others."""
    train(model, setup.data.train, setup.epochs, setup.lr)
    return Pruned(model, state_bytes(model), "fine-tuned for as long as the others")


def by_torch(setup: Setup, model: nn.Module) -> Pruned:
    """Prune the same share of each layer's channels with ln_structured, fine-tune with its hooks on, then bake."""
    last = classifier(model)
    layers = [one for one in model.modules() if isinstance(one, nn.Conv2d | nn.Linear) and one is not last]
    for layer in layers:
        prune.ln_structured(layer, "weight", amount=setup.ratio, n=2, dim=0)
    train(model, setup.data.train, setup.epochs, setup.lr)
    for layer in layers:
        prune.remove(layer, "weight")
    return Pruned(model, state_bytes(model), "zeros stay in the file; batch norm's shift and residual sums stay alive")


def by_torch_pruning(setup: Setup, model: nn.Module) -> Pruned:
    """Remove the same share of each group's channels with the high-level pruner, then fine-tune."""
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        setup.example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=setup.ratio,
        ignored_layers=[classifier(model)],
    )
    pruner.step()
    train(model, setup.data.train, setup.epochs, setup.lr)
    return Pruned(model, state_bytes(model), "a plain state dict: loads only into code that builds these widths")


def by_robustkit(setup: Setup, model: nn.Module) -> Pruned:
    """Mask the same share of each group's channels, fine-tune with the masks held, shrink and check."""
    masks = channel_masks(model, Masks(), setup.ratio, setup.example)
    masks.apply_(model)
    train(model, setup.data.train, setup.epochs, setup.lr, masks.apply_)
    small = shrink(model, setup.example).model.eval()
    apart = largest_difference(model, small, setup.data.test.floats(0, 64))
    if apart > TOLERANCE:
        raise SystemExit(f"the shrunk model's logits are {apart:.2g} from the masked one's")
    return Pruned(small, _file(setup, small), f"logits within {apart:.0e} of the masked model's; loads by itself")


def sparse_by_torch(setup: Setup, model: nn.Module) -> Pruned:
    """Prune single weights with global_unstructured, fine-tune with its hooks on, then bake."""
    layers = [(one, "weight") for one in model.modules() if isinstance(one, nn.Conv2d | nn.Linear)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=setup.sparsity)
    train(model, setup.data.train, setup.epochs, setup.lr)
    for layer, name in layers:
        prune.remove(layer, name)
    return Pruned(model, state_bytes(model), "no layer is protected from being emptied")


def sparse_by_robustkit(setup: Setup, model: nn.Module) -> Pruned:
    """Prune single weights by magnitude over all layers, fine-tune with the masks held."""
    masks = global_masks(magnitude_scores(model), Masks(), setup.sparsity, 0.99)
    masks.apply_(model)
    train(model, setup.data.train, setup.epochs, setup.lr, masks.apply_)
    return Pruned(model, _file(setup, model), "no layer loses more than 99 %")


def _file(setup: Setup, model: nn.Module) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(model, path, setup.use, shape=setup.data.shape, classes=setup.data.classes)
        return path.read_bytes()


def rows(setup: Setup) -> dict[str, Callable[[Setup, nn.Module], Pruned]]:
    """Return what is compared, by name."""
    channels, weights = f"channels {setup.ratio:.0%}", f"weights {setup.sparsity:.0%}"
    return {
        "nothing pruned": unpruned,
        f"torch.nn.utils.prune, {channels}": by_torch,
        f"Torch-Pruning, {channels}": by_torch_pruning,
        f"robustkit, {channels}": by_robustkit,
        f"torch.nn.utils.prune, {weights}": sparse_by_torch,
        f"robustkit, {weights}": sparse_by_robustkit,
    }


def compare(setup: Setup, parent: nn.Module, examples: int) -> None:
    """Prune, fine-tune and measure, and print a table."""
    made = {}
    for name, make in rows(setup).items():
        started = time.perf_counter()
        torch.manual_seed(0)
        made[name] = make(setup, copy.deepcopy(parent))
        print(f"{name}: {time.perf_counter() - started:.0f} s; {made[name].note}", flush=True)
    models = {name: one.model.eval() for name, one in made.items()}
    times = measure_latency(models, setup.data.shape, CPU, batch_sizes=(1, 64), runs=30)
    test = fixed_subset(setup.data.test, examples)
    head = ["", "clean", "attacked", "bytes", "gzip", "MACs", "one image, ms", "64 images, ms"]
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, one in made.items():
        found = evaluate(one.model, test.images, test.labels, threat=THREAT, attacks=[Pgd(steps=20)], seed=0)
        speed = [f"{times[name][batch].median:.2f} ({times[name][batch].q1:.2f})" for batch in ("batch_1", "batch_64")]
        cells = [
            f"{100 * found.clean.value:.1f}",
            f"{100 * found.worst.value:.1f} [{100 * found.worst.low:.1f}, {100 * found.worst.high:.1f}]",
            f"{len(one.content):,}",
            f"{gzip_size(one.content):,}",
            f"{count_macs(one.model, setup.data.shape) / 1e6:.1f} M",
            *speed,
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Parse the command line, train the parent, and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", required=True, help="folder of CIFAR-10 images")
    parser.add_argument("--limit", type=int, default=4000, help="training images")
    parser.add_argument("--width", type=int, default=16, help="of the ResNet-18; 64 is the original")
    parser.add_argument("--epochs", type=int, default=6, help="of the parent")
    parser.add_argument("--tune", type=int, default=3, help="epochs of fine-tuning, the same for all")
    parser.add_argument("--ratio", type=float, default=0.5, help="of channels")
    parser.add_argument("--sparsity", type=float, default=0.9, help="of single weights")
    parser.add_argument("--examples", type=int, default=500, help="test images")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    source = Use(name="image_folder", parameters={"root": given.cifar, "limit": given.limit}, label="cifar10")
    data = load_dataset(source, validation=0.1, folder=Path.cwd())
    use = Use(name="resnet18", parameters={"width": given.width}, label="resnet18")
    torch.manual_seed(0)
    parent = build_model(use, shape=data.shape, classes=len(data.classes), mean=data.mean, std=data.std)
    print(f"{len(data.train)} images, {given.threads} thread(s), torch {torch.__version__}, linf 8/255", flush=True)
    train(parent, data.train, given.epochs, 0.1)
    compare(Setup(data, use, given.ratio, given.sparsity, given.tune, 0.05), parent, given.examples)


if __name__ == "__main__":
    main()
