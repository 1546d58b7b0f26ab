"""`robustkit attack`: how robust is the model in this file?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from robustkit import registry
from robustkit.cli.options import read_attacks, read_budget, read_data, read_numbers, read_use
from robustkit.errors import ExitCode, ModelError, UsageError
from robustkit.recipe.spec import ThreatSpec, Use

if TYPE_CHECKING:
    from torch import nn

    from robustkit.data.split import Dataset
    from robustkit.evaluation.api import Evaluation


@click.command("attack", epilog="Example: robustkit attack net.pt --model torchvision.resnet18 --data cifar10")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="A source, e.g. cifar10 or 'digits: {size: 16}', a folder, an npz file.")
@click.option(
    "--model", "architecture", envvar="ROBUSTKIT_ATTACK_MODEL", help="Of a state dict: resnet18, file.py:Net."
)
@click.option("--mean", help="Of a state dict: what images are normalized with; default: the training images' own.")
@click.option("--std", help="The same for the deviation; one number a channel, e.g. 0.25,0.24,0.26.")
@click.option("--threat", default="linf:8/255", show_default=True, help="Norm and eps, images being in [0, 1].")
@click.option("--attacks", default="fgsm,cascade", show_default=True, help="E.g. 'fgsm, pgd: {steps: 50}'.")
@click.option("--examples", type=click.IntRange(min=1), default=1000, show_default=True, help="Test images, at most.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the attacks.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps; auto: cuda if it is there.")
@click.option("--trust-plugins", is_flag=True, help="Let Python code run that the options or the file name.")
@click.option("--json", "as_json", envvar="ROBUSTKIT_ATTACK_JSON", is_flag=True, help="Print JSON.")
def command(
    model: Path,
    data: str,
    architecture: str | None,
    mean: str | None,
    std: str | None,
    threat: str,
    attacks: str,
    examples: int,
    seed: int,
    device: str,
    trust_plugins: bool,
    as_json: bool,
) -> int:
    """Attack the model in the file MODEL on test images; print accuracies with intervals, flags and a verdict.

    MODEL is a model.safetensors of robustkit's, or with --model the state dict of any PyTorch model (.pt, .pth,
    .safetensors), pruned by torch.nn.utils.prune or not. Exit code 1 where a flag says that the figures are wrong.
    """
    budget = read_budget(threat)
    source, chosen = read_data(data), read_attacks(attacks, budget)
    named = read_use("model", architecture, "--model") if architecture else None
    if not trust_plugins:
        _refuse_code("data", source)
        _refuse_code("attack", *chosen)
        _refuse_code("model", *([named] if named else []))
    ours = _tells_architecture(model, named, mean, std)
    dataset = _dataset(source)
    if ours:
        network = _stored(model, dataset, trust_plugins)
    else:
        network = _named(model, named, dataset, mean, std, trust_plugins)
    found = _evaluated(network, dataset, budget, chosen, examples, seed, device)
    _print(found, model, data, as_json)
    if found.clean.low <= 1 / len(dataset.classes):
        hint = "" if ours else " and how images are normalized (--mean, --std)"
        click.echo(f"warning: no better than chance without an attack: check the order of classes{hint}", err=True)
    wrong = any(flag.severity == "wrong" for flag in found.flags)
    return int(ExitCode.STEP_FAILED if wrong else ExitCode.OK)


def _refuse_code(kind: registry.Kind, *uses: Use) -> None:
    for use in uses:
        if registry.runs_user_code(registry.find(kind, use.name, folder=Path.cwd())):
            raise UsageError(f"{use.name} is code: read it; if you trust it, add --trust-plugins")


def _dataset(use: Use) -> Dataset:
    from robustkit.data.load import load_dataset

    return load_dataset(use, folder=Path.cwd())


def _tells_architecture(path: Path, use: Use | None, mean: str | None, std: str | None) -> bool:
    """Say whether the file is a model of robustkit's, and refuse options that do not go with it."""
    from robustkit.models.architecture import is_model_file

    ours = is_model_file(path)
    if ours and (use is not None or mean is not None or std is not None):
        raise UsageError(f"{path} says itself what it is: leave out --model, --mean and --std")
    if (mean is None) != (std is None):
        raise UsageError(
            "--mean and --std are given together; without both, the statistics of the training images are taken"
        )
    if not ours and use is None:
        raise UsageError(
            f"{path} holds no architecture: name it, e.g. --model torchvision.resnet18 (`robustkit list model`)"
        )
    return ours


def _stored(path: Path, data: Dataset, trusted: bool) -> nn.Module:
    from robustkit.models.architecture import read_architecture
    from robustkit.models.artefact import load_model

    described = read_architecture(path)
    _check_fit(path, described.shape, described.classes, data)
    return load_model(path, folder=Path.cwd(), trust_plugins=trusted)


def _named(path: Path, use: Use | None, data: Dataset, mean: str | None, std: str | None, trusted: bool) -> nn.Module:
    from robustkit.models.weights import load_weights

    assert use is not None
    channels = data.shape[0]
    return load_weights(
        path,
        model=use,
        shape=data.shape,
        classes=len(data.classes),
        mean=data.mean if mean is None else read_numbers(mean, "--mean", channels),
        std=data.std if std is None else read_numbers(std, "--std", channels),
        folder=Path.cwd(),
        trust_plugins=trusted,
    )


def _check_fit(path: Path, shape: tuple[int, int, int], classes: tuple[str, ...], data: Dataset) -> None:
    if shape != data.shape:
        raise ModelError(
            f"{path} takes images {shape}, the data have {data.shape}; sources resize, e.g. "
            f"--data 'image_folder: {{root: ..., size: {shape[1]}}}'"
        )
    if len(classes) != len(data.classes) or (set(classes) == set(data.classes) and classes != data.classes):
        raise ModelError(f"{path} has the classes {', '.join(classes)}; the data have {', '.join(data.classes)}")
    if classes != data.classes:
        click.echo(f"warning: the model calls its classes {', '.join(classes)}; they are taken in this order", err=True)


def _evaluated(
    model: nn.Module, data: Dataset, budget: ThreatSpec, attacks: tuple[Use, ...], examples: int, seed: int, device: str
) -> Evaluation:
    from robustkit.data.split import fixed_subset
    from robustkit.evaluation.api import evaluate
    from robustkit.workbench import choose_device, threat_of

    place = choose_device(device)
    test = fixed_subset(data.test, examples)
    specs = [{use.name: {**use.parameters, "as": use.label}} for use in attacks]
    return evaluate(model.to(place), test.images, test.labels, threat=threat_of(budget), attacks=specs, seed=seed)


def _print(found: Evaluation, model: Path, data: str, as_json: bool) -> None:
    from robustkit.evaluation.verdict import verdict_of

    if not as_json:
        click.echo(f"{found!r}\n\n{verdict_of(found)}")
        return
    record = {
        "model": str(model),
        "data": data,
        "threat": {"norm": found.threat.norm, "eps": found.threat.eps},
        "clean": found.clean.model_dump(),
        "attacks": {label: rate.model_dump() for label, rate in found.attacks.items()},
        "worst": found.worst.model_dump(),
        "flags": [flag.model_dump() for flag in found.flags],
        "verdict": verdict_of(found),
    }
    click.echo(json.dumps(record, indent=2))
