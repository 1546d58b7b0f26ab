"""Robust accuracy and cost of robustkit's attacks beside those of other libraries: same examples, process and threads.

    python tests/benchmarks/attacks.py engines --runs runs --cifar ~/cifar10
    python tests/benchmarks/attacks.py pgd --runs runs --cifar ~/cifar10

in an environment with robustkit and, of the peers, what is to be compared: `pip install pyautoattack foolbox
adversarial-robustness-toolbox` (torchattacks comes with robustkit). A peer that is not installed is left out, and
named.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from subjects import Subject, subjects
from torch import Tensor, nn

from robustkit.attacks.cascade import Cascade
from robustkit.attacks.counting import CountedModel
from robustkit.attacks.engine import Engine
from robustkit.attacks.gradient import Pgd
from robustkit.attacks.threat import Attack, Threat
from robustkit.evaluation.attacked import attack_outcome, clean_outcome

CPU = torch.device("cpu")
STEPS = 20
PEERS = {"pyautoattack": "pyautoattack", "torchattacks": "torchattacks", "foolbox": "foolbox", "art": "art"}


@dataclass(frozen=True)
class Result:
    """What an attack left standing (N,), and what it cost."""

    right: Tensor
    seconds: float
    cpu_seconds: float
    forwards: int
    backwards: int

    @property
    def units(self) -> int:
        """Forwards and input-only backwards."""
        return self.forwards + self.backwards

    def row(self) -> str:
        """Return the cells of a table."""
        size = len(self.right)
        robust = 100 * float(self.right.float().mean())
        return (
            f"{robust:.1f} | {self.seconds:.1f} | {self.cpu_seconds:.1f} | {self.forwards / size:,.0f} | "
            f"{self.backwards / size:,.0f}"
        )


def timed(subject: Subject, attack: Callable[[CountedModel], Tensor]) -> Result:
    """Run an attack that returns images (N, ...), and judge these by one more forward, outside the clock."""
    counted = CountedModel(subject.model).eval()
    started, cpu = time.perf_counter(), time.process_time()
    found = attack(counted)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    with torch.no_grad():
        right = subject.model(found).argmax(1) == subject.y
    inside = (found - subject.x).abs().amax() <= subject.eps + 1e-5 and bool((found >= 0).all() and (found <= 1).all())
    if not inside:
        raise SystemExit(f"{subject.name}: an attack left the ball or the box")
    return Result(right, seconds, cpu_seconds, counted.forwards, counted.backwards)


def ours(subject: Subject, attack: Attack) -> Result:
    """Run one of robustkit's attacks the way `evaluate` does, its look at each result included."""
    clean = clean_outcome(subject.model, subject.x, subject.y, batch_size=256, device=CPU)
    started, cpu = time.perf_counter(), time.process_time()
    outcome = attack_outcome(
        subject.model,
        subject.x,
        subject.y,
        attack,
        Threat("linf", subject.eps),
        clean=clean,
        seed=0,
        label="benchmark",
        batch_size=256,
        device=CPU,
    )
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    forwards = outcome.forwards + clean.forwards
    return Result(torch.from_numpy(outcome.correct), seconds, cpu_seconds, forwards, outcome.backwards)


def official(subject: Subject) -> Result:
    """Run AutoAttack-standard in the port of the official code."""
    from pyautoattack import AutoAttack

    def attack(model: CountedModel) -> Tensor:
        engine = AutoAttack(model, norm="Linf", eps=subject.eps, version="standard", device="cpu", seed=0)
        found = engine.run_standard_evaluation(subject.x, subject.y, batch_size=256)
        return found[0] if isinstance(found, tuple) else found

    return timed(subject, attack)


def torchattacks_pgd(subject: Subject) -> Result:
    """Run torchattacks' PGD."""
    import torchattacks

    def attack(model: CountedModel) -> Tensor:
        pgd = torchattacks.PGD(model, eps=subject.eps, alpha=subject.eps / 4, steps=STEPS)
        found: Tensor = pgd(subject.x, subject.y)
        return found

    return timed(subject, attack)


def foolbox_pgd(subject: Subject) -> Result:
    """Run foolbox' PGD."""
    import foolbox

    def attack(model: CountedModel) -> Tensor:
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        pgd = foolbox.attacks.LinfPGD(rel_stepsize=0.25, steps=STEPS)
        found: Tensor = pgd(wrapped, subject.x, subject.y, epsilons=subject.eps)[1]
        return found

    return timed(subject, attack)


def art_pgd(subject: Subject) -> Result:
    """Run ART's PGD."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    def attack(model: CountedModel) -> Tensor:
        classifier = PyTorchClassifier(
            model,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(subject.x.shape[1:]),
            nb_classes=int(subject.y.max()) + 1,
            clip_values=(0.0, 1.0),
            device_type="cpu",
        )
        pgd = ProjectedGradientDescentPyTorch(
            classifier,
            eps=subject.eps,
            eps_step=subject.eps / 4,
            max_iter=STEPS,
            num_random_init=1,
            batch_size=256,
            verbose=False,
        )
        return torch.from_numpy(pgd.generate(subject.x.numpy(), subject.y.numpy()))

    return timed(subject, attack)


def pure_passes(subject: Subject, layout: torch.memory_format = torch.contiguous_format) -> Result:
    """Take as many forwards and input gradients as PGD has steps, of all examples, and nothing else."""
    counted = CountedModel(subject.model, Engine(layout)).eval()
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        for images in subject.x.split(256):
            start = images.clone().requires_grad_()
            torch.autograd.grad(counted(start).sum(), start)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    right = torch.ones(len(subject.y), dtype=torch.bool)
    return Result(right, seconds, cpu_seconds, counted.forwards, counted.backwards)


def engines(chosen: list[Subject]) -> None:
    """Print cascade beside official AutoAttack."""
    print(
        "| model | | n | clean | attack | robust | s | CPU s | forwards | backwards | AA / ours: s | CPU s | passes |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for subject in chosen:
        with torch.no_grad():
            clean = 100 * float((subject.model(subject.x).argmax(1) == subject.y).float().mean())
        head = f"| {subject.name} | {subject.role} | {len(subject.y)} | {clean:.1f}"
        mine = ours(subject, Cascade())
        peer = official(subject) if installed("pyautoattack") else None
        ratio = ""
        if peer is not None:
            print(f"{head} | AutoAttack | {peer.row()} | | | |", flush=True)
            ratio = (
                f"{peer.seconds / mine.seconds:.1f} | {peer.cpu_seconds / mine.cpu_seconds:.1f} | "
                f"{peer.units / mine.units:.1f}"
            )
            only = int((mine.right & ~peer.right).sum()), int((peer.right & ~mine.right).sum())
            ratio += f" | fooled only by AutoAttack {only[0]}, only by cascade {only[1]}"
        print(f"{head} | cascade | {mine.row()} | {ratio} |", flush=True)


def pgd(chosen: list[Subject]) -> None:
    """Print PGD-20 of four libraries, and the passes that it needs."""
    rows: list[tuple[str, str, Callable[[Subject], Result]]] = [
        ("passes alone", "torch", pure_passes),
        ("passes alone, channels last", "torch", lambda subject: pure_passes(subject, torch.channels_last)),
        ("robustkit pgd", "torch", lambda subject: ours(subject, Pgd(steps=STEPS))),
        ("robustkit pgd, cross-entropy", "torch", lambda subject: ours(subject, Pgd(steps=STEPS, loss="ce"))),
        ("torchattacks PGD", "torchattacks", torchattacks_pgd),
        ("foolbox LinfPGD", "foolbox", foolbox_pgd),
        ("ART PGD", "art", art_pgd),
    ]
    print(
        "| model | n | attack | robust | s | CPU s | forwards | backwards | CPU us a pass | CPU s / robustkit pgd's |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for subject in chosen:
        results = {name: run(subject) for name, module, run in rows if installed(module)}
        base = results["robustkit pgd"].cpu_seconds
        for name, result in results.items():
            each = 1e6 * result.cpu_seconds / result.units
            ratio = result.cpu_seconds / base
            print(
                f"| {subject.name} | {len(subject.y)} | {name} | {result.row()} | {each:.0f} | {ratio:.2f} |",
                flush=True,
            )


def installed(module: str) -> bool:
    """Say whether a peer is there."""
    return importlib.util.find_spec(module) is not None


def main() -> None:
    """Parse the command line and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["engines", "pgd"])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the shipped recipes were run")
    parser.add_argument("--cifar", help="folder of CIFAR-10 images, as in the run of cifar10-defenses")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", help="some of the subjects; default: all")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    known = subjects(given.runs, given.cifar, given.examples)
    names = given.models or list(known)
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"unknown models {', '.join(unknown)}; known: {', '.join(known)}")
    absent = [name for name in PEERS.values() if not installed(name)]
    if absent:
        print(f"not installed, so not compared: {', '.join(absent)}")
    chosen = [known[name]() for name in names]
    print(f"{given.examples} examples, {given.threads} thread(s), torch {torch.__version__}\n")
    (engines if given.table == "engines" else pgd)(chosen)


if __name__ == "__main__":
    main()
