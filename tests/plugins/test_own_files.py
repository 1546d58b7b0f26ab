"""A file of the user's own: data, a model and an attack from it, through `plugins:` and by `file.py:Class`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import robustkit
from robustkit.cli.group import run as cli
from robustkit.data.load import load_dataset
from robustkit.errors import DataError, ModelError, RecipeError
from robustkit.pipeline import plan_of
from robustkit.recipe.schema import load_recipe, parse_recipe
from robustkit.results import Results

OWN = '''
import numpy as np
from torch import nn

from robustkit.data.arrays import Arrays, names_of
from robustkit.models.small_cnn import SmallCnn


class Mine:
    """Two classes of noise, dark and bright."""

    def __init__(self, count: int = 60):
        self.count = count

    def fingerprint(self):
        return f"noise/{self.count}"

    def read(self):
        labels = np.arange(self.count) % 2
        images = np.random.default_rng(0).integers(0, 100, (self.count, 1, 8, 8)) + 100 * labels[:, None, None, None]
        images = images.astype(np.uint8)
        return Arrays(images, labels, images[:20], labels[:20], names_of(2))


class Net(SmallCnn):
    """A small CNN under another name."""


class Shift:
    """Brighten every image by eps."""

    def __call__(self, model, x, y, threat, *, generator):
        return (x + threat.eps).clamp(0, 1)
'''
TEXT = """\
name: own
data: {DATA: {count: 80}}
model: {NET: {widths: [4, 4]}}
threat: {norm: linf, eps: 0.1}
train: {epochs: 1, batch_size: 20}
variants: {a: }
evaluate: {attacks: [ATTACK], latency: false}
"""
IN_FILE = TEXT.replace("DATA", "'own.py:Mine'").replace("NET", "'own.py:Net'")
BARE = TEXT.replace("DATA", "Mine").replace("NET", "Net").replace("ATTACK", "Shift") + "plugins: [own.py]\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def run(folder: Path, text: str) -> Results:
    (folder / "own.yaml").write_text(text)
    return robustkit.run(folder / "own.yaml", runs=folder / "runs")


def test_data_a_model_and_an_attack_by_their_bare_names(folder: Path) -> None:
    found = run(folder, BARE)
    assert set(found.variants[0].attacks) == {"Shift"}
    assert found.variants[0].clean.n == 20
    recipe = load_recipe(folder / "own.yaml")
    data = load_dataset(recipe.data, folder=folder, plugins=recipe.plugins)
    assert data.shape == (1, 8, 8)
    (stored,) = (folder / "runs" / "own").rglob("model.safetensors")
    with pytest.raises(ModelError, match="trust_plugins=True"):
        robustkit.load(stored, folder=folder, plugins=recipe.plugins)
    model = robustkit.load(stored, folder=folder, plugins=recipe.plugins, trust_plugins=True)
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 2)


def test_data_a_model_and_an_attack_by_their_files(folder: Path) -> None:
    text = IN_FILE.replace("ATTACK", "'own.py:Shift', 'own.py:Shift': {as: again}")
    found = run(folder, text + "gates: [Shift(a) >= 0%]\n")
    assert set(found.variants[0].attacks) == {"Shift", "again"}


@pytest.mark.parametrize("label", ["worst", "a:b", "../x"])
def test_a_label_that_cannot_be_says_what_to_write(label: str, folder: Path) -> None:
    text = IN_FILE.replace("ATTACK", f"'own.py:Shift': {{as: '{label}'}}")
    with pytest.raises(RecipeError, match="as: other-name"):
        parse_recipe(text, folder=folder)


def test_a_changed_data_source_is_read_again(folder: Path) -> None:
    recipe = parse_recipe(BARE, folder=folder)

    def seen() -> tuple[set[str], float]:
        keys = {step.key for step in plan_of(recipe).steps}
        return keys, load_dataset(recipe.data, folder=folder, plugins=recipe.plugins).mean[0]

    before, dark = seen()
    assert seen() == (before, dark)
    (folder / "own.py").write_text(OWN.replace("100 *", "120 *"))
    after, bright = seen()
    assert not before & after
    assert bright > dark + 0.02


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('return f"noise/{self.count}"', "return 1 / 0", r"ZeroDivisionError: .*own\.py:16"),
        ("def fingerprint", "def print", "AttributeError: .*fingerprint"),
        ("self.count = count", "raise KeyError('count')", r"KeyError: 'count' .*own\.py:13"),
        ("import numpy as np", "import numpy as np\n[][0]", r"IndexError: .*own\.py:3"),
    ],
    ids=["fingerprint", "no fingerprint", "constructor", "import"],
)
def test_a_data_source_that_fails_is_named(
    old: str, new: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "own.py").write_text(OWN.replace(old, new))
    with pytest.raises(DataError, match=f"data 'Mine' fails: {message}"):
        plan_of(parse_recipe(BARE, folder=folder))
    (folder / "own.yaml").write_text(BARE)
    assert cli(["check", str(folder / "own.yaml"), "--trust-plugins"]) == 1
    shown = capsys.readouterr()
    assert "error: data 'Mine' fails" in shown.err
    assert "Traceback" not in shown.err


TRAINING = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

from robustkit.train.hooks import Defense


@dataclass(frozen=True)
class Plain:
    """Gradient descent that notes its peak."""

    lr: float = 0.1

    def build(self, groups):
        return torch.optim.SGD(groups, lr=self.lr)


@dataclass(frozen=True)
class Never:
    """A learning rate of zero: nothing may be learned."""

    def factor(self, progress, epoch):
        return 0.0


class OnlyL2(Defense):
    """Trains against l2 alone."""

    norms: ClassVar[tuple[str, ...]] = ("l2",)


class L1Attack:
    """Attacks under l1 alone."""

    norms = ("l1",)

    def __call__(self, model, x, y, threat, *, generator):
        return x
'''
SCHEDULED = """\
name: own
data: {digits: {limit: 200}}
model: {small_cnn: {widths: [4, 4]}}
threat: {norm: linf, eps: 0.1}
train: {epochs: 2, batch_size: 50, optimizer: {OPTIMIZER: {lr: 0.2}}, schedule: SCHEDULE, guards: false}
variants: {a: DEFENSES}
evaluate: {attacks: [ATTACK], latency: false, examples: 20}
"""


@pytest.mark.parametrize("where", ["", "own.py:"])
def test_optimizers_and_schedules_of_ones_own(tmp_path: Path, where: str) -> None:
    (tmp_path / "own.py").write_text(TRAINING)
    text = SCHEDULED.replace("OPTIMIZER", f"'{where}Plain'").replace("SCHEDULE", f"'{where}Never'")
    text = text.replace("DEFENSES", "").replace("ATTACK", "noise") + ("" if where else "plugins: [own.py]\n")
    (tmp_path / "recipe.yaml").write_text(text)
    (variant,) = robustkit.run(tmp_path / "recipe.yaml", runs=tmp_path / "runs").variants
    assert [row.lr for row in variant.epochs] == [0, 0], "the schedule of one's own was used"


def test_own_attacks_and_defenses_declare_their_norms(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(TRAINING)
    text = SCHEDULED.replace("OPTIMIZER", "sgd").replace("SCHEDULE", "constant") + "plugins: [own.py]\n"
    with pytest.raises(RecipeError, match="OnlyL2 trains against l2; the threat is linf"):
        parse_recipe(text.replace("DEFENSES", "{defenses: [OnlyL2]}").replace("ATTACK", "noise"), folder=tmp_path)
    with pytest.raises(RecipeError, match="L1Attack works under l1; the threat is linf"):
        parse_recipe(text.replace("DEFENSES", "").replace("ATTACK", "L1Attack"), folder=tmp_path)
    fits = text.replace("norm: linf", "norm: l2").replace("DEFENSES", "{defenses: [OnlyL2]}").replace("ATTACK", "noise")
    parse_recipe(fits, folder=tmp_path)
