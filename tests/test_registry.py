"""Plugins by name: found without being imported, their parameters read from their signatures."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import robustkit
from robustkit import registry
from robustkit.errors import UsageError
from robustkit.pipeline import check_trust, plan_of, user_code
from robustkit.recipe.schema import parse_recipe

EVERY = [(kind, name) for kind in registry.KINDS for name in registry.BUILTIN[kind]]


@pytest.mark.parametrize(("kind", "name"), EVERY, ids=[f"{kind}-{name}" for kind, name in EVERY])
def test_what_is_read_from_the_source_is_what_the_class_takes(kind: registry.Kind, name: str) -> None:
    entry = registry.find(kind, name)
    made = registry.load(entry)
    live = inspect.signature(made).parameters
    read = {one.name: one for one in registry.parameters(entry)}
    # What robustkit fills in itself (shapes, classes, the parameters to optimise) is no parameter of a recipe.
    assert set(read) <= set(live)
    hidden = set(live) - set(read)
    assert hidden <= {"shape", "classes", "parameters", "params", "total", "optimizer", "self", "epochs", "steps",
                      "model", "in_shape", "channels"}, hidden  # fmt: skip
    for parameter in read.values():
        default = live[parameter.name].default
        assert parameter.required == (default is inspect.Parameter.empty)
        if not parameter.required and isinstance(default, str | int | float | bool | None):
            assert parameter.default == default
    assert registry.summary(entry), "a plugin needs a docstring"


@pytest.mark.parametrize(
    ("kind", "name", "hint"),
    [("attack", "pdg", "pgd"), ("defense", "trade", "trades"), ("model", "resnet81", "resnet18"),
     ("attack", "torchattacks.PDG", "PGD"), ("model", "torchvision.resnet81", "resnet18")],
)  # fmt: skip
def test_a_misspelt_name_gets_the_right_one(kind: registry.Kind, name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        registry.find(kind, name)


def test_files_and_modules(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        'from robustkit.train.hooks import Defense\nraise SystemExit("run")\n\nclass Quiet(Defense):\n    "Nothing."\n'
        "    def __init__(self, weight: float = 0.5) -> None:\n        self.weight = weight\n"
    )
    entry = registry.find("defense", "mine.py:Quiet", folder=tmp_path)
    assert [one.name for one in registry.parameters(entry)] == ["weight"]
    assert registry.runs_user_code(entry)
    for wrong, message in (("mine.py:Loud", "Loud"), ("other.py:Quiet", "other.py"), ("no.such.module:X", "no")):
        with pytest.raises(UsageError, match=message):
            registry.find("defense", wrong, folder=tmp_path)
    assert not registry.runs_user_code(registry.find("compressor", "torch.nn.utils.prune:L1Unstructured"))


def test_parameters_are_inherited(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom robustkit.defenses.adversarial import PgdTraining\n"
        "from robustkit.models.small_cnn import SmallCnn\nraise SystemExit\n"
        "class Plain(PgdTraining): 'Plain.'\n"
        "@dataclass(frozen=True)\nclass More(PgdTraining):\n    steps: int = 3\n    weight: float = 0.5\n"
        "class Own(Plain):\n    def __init__(self, weight): ...\n"
        "class Net(SmallCnn): 'Net.'\n"
    )

    def names(kind: registry.Kind, name: str) -> dict[str, object]:
        found = registry.parameters(registry.find(kind, f"mine.py:{name}", folder=tmp_path))
        return {one.name: one.default for one in found}

    base = {one.name: one.default for one in registry.parameters(registry.find("defense", "pgd_training"))}
    assert names("defense", "Plain") == base
    assert names("defense", "More") == base | {"steps": 3, "weight": 0.5}
    assert list(names("defense", "More")) == [*base, "weight"]
    assert list(names("defense", "Own")) == ["weight"]
    assert list(names("model", "Net")) == ["widths", "extra", "whiten", "dirac"]


RECIPE = "data: digits\nmodel: small_cnn\nvariants:\n  one: {defenses: ['mine.py:Quiet']}\n"


def test_code_of_a_recipe_needs_trust(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "mine.py").write_text(
        f"from robustkit.train.hooks import Defense\nopen({str(mark)!r}, 'w')\n\nclass Quiet(Defense):\n    'Q.'\n"
    )
    recipe = parse_recipe(RECIPE, folder=tmp_path)
    plan_of(recipe)
    assert user_code(recipe) == ["mine.py:Quiet"]
    with pytest.raises(UsageError, match="--trust-plugins"):
        check_trust(recipe, trust_plugins=False)
    check_trust(recipe, trust_plugins=True)
    assert not mark.exists(), "planning ran the file"


def test_a_changed_file_changes_the_keys(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from robustkit import Defense\n\nclass Quiet(Defense):\n    'Q.'\n")
    text = RECIPE + "  two:\n"
    before = {step.key: step.variant for step in plan_of(parse_recipe(text, folder=tmp_path)).steps}
    with (tmp_path / "mine.py").open("a") as file:
        file.write("# changed\n")
    after = {step.key: step.variant for step in plan_of(parse_recipe(text, folder=tmp_path)).steps}
    assert {name for key, name in after.items() if key not in before} == {"one", ""}


def test_a_file_that_changes_while_python_runs_is_imported_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    text = "from robustkit import Defense\n\nclass Quiet(Defense):\n    weight = 1\n"
    made = []
    for weight in (1, 2, 2):
        path.write_text(text.replace("weight = 1", f"weight = {weight}"))
        made.append(registry.load(registry.find("defense", "mine.py:Quiet", folder=tmp_path)))
    assert [one.weight for one in made] == [1, 2, 2]
    assert made[1] is made[2]


CELL = """
import functools
import robustkit
from robustkit import registry

@robustkit.register("attack")
class Quiet:
    weight = 1
    @functools.lru_cache
    def __call__(self, model, x, y, threat, *, generator):
        return [0.5 * one for one in x if one in {"a", "b", "c", "d"}]

print(registry.source_hash(registry.find("attack", "quiet")))
"""


def test_a_class_typed_into_an_interpreter_changes_the_keys() -> None:
    def typed(cell: str) -> str:
        return subprocess.run([sys.executable, "-c", cell], check=True, capture_output=True, text=True).stdout

    first = typed(CELL)
    assert typed(CELL) == first, "another process gives another key"
    assert len({first, typed(CELL.replace("weight = 1", "weight = 2")), typed(CELL.replace("0.5", "0.6"))}) == 3


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", registry.Registered())

    @robustkit.register("defense")
    class MyQuietOne(robustkit.Defense):
        """Nothing."""

        def __init__(self, weight: float = 0.5) -> None:
            self.weight = weight

    entry = registry.find("defense", "my_quiet_one")
    clean, problems = registry.check_parameters(entry, {"weight": "25%"})
    assert not problems
    made = registry.create(entry, clean)
    assert isinstance(made, MyQuietOne)
    assert made.weight == 0.25
    assert "my_quiet_one" in registry.names("defense")
    recipe = parse_recipe(RECIPE.replace("'mine.py:Quiet'", "my_quiet_one: {weight: 1}"))
    check_trust(recipe, trust_plugins=False)
    with pytest.raises(UsageError, match="built-in"):
        robustkit.register("defense", "dropout")(MyQuietOne)
    with pytest.raises(UsageError, match="kind"):
        robustkit.register("defence")  # type: ignore[arg-type]


def test_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution on the path, as pip would leave it."""
    info = tmp_path / "other_defenses-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-defenses\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[robustkit.defenses]\nfrom_outside = other_defenses:Outside\n")
    (tmp_path / "other_defenses.py").write_text(
        "from robustkit import Defense\n\nclass Outside(Defense):\n    'From outside.'\n"
        "    def __init__(self, weight: float = 1.0) -> None:\n        self.weight = weight\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = registry.find("defense", "from_outside")
    assert registry.summary(entry) == "From outside."
    assert not registry.runs_user_code(entry), "what pip installed is trusted"
    assert registry.create(entry, {"weight": 2.0}).weight == 2.0
    assert "from_outside" in registry.names("defense")
    sys.modules.pop("other_defenses", None)
