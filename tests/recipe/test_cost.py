"""What `check` says a recipe costs: never less than what is counted, and not much more."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustkit import registry
from robustkit.attacks.counting import CountedModel
from robustkit.attacks.gradient import Pgd
from robustkit.attacks.noise import Noise
from robustkit.attacks.threat import Threat
from robustkit.attacks.torchattacks_cost import RULES
from robustkit.attacks.torchattacks_table import PROFILES
from robustkit.data.corruptions import CORRUPTIONS
from robustkit.data.split import split_of
from robustkit.evaluation.attacked import attack_outcome, clean_outcome
from robustkit.evaluation.certified import certified_outcome
from robustkit.evaluation.checks import EXAMPLES, preflight, probes
from robustkit.evaluation.corrupted import corruption_outcome
from robustkit.evaluation.curve import security_curve
from robustkit.recipe import cost
from robustkit.recipe.facts import facts_of
from robustkit.recipe.norms import ATTACK_NORMS
from robustkit.recipe.schema import parse_recipe
from robustkit.recipe.spec import Recipe, Use
from robustkit.steps import evaluate
from robustkit.train.validate import ROBUST_EXAMPLES, clean_loss_and_accuracy, robust_accuracy

CPU = torch.device("cpu")
EPS = {"linf": 0.1, "l2": 1.0, "l1": 5.0, "l0": 3}
IMAGES = 2
QUICK: dict[str, list[dict[str, Any]]] = {
    "SPSA": [{"nb_iter": 2}, {"nb_sample": 10, "max_batch_size": 4}],
    "Square": [{"n_queries": 50, "n_restarts": 3}],
    "APGD": [{"steps": 5, "n_restarts": 2, "eot_iter": 3}, {}],
    "APGDT": [{"steps": 5}, {"steps": 3, "n_restarts": 2, "eot_iter": 2}],
    "FAB": [{"steps": 5}, {"steps": 3, "n_restarts": 2}, {"steps": 3, "multi_targeted": True, "n_restarts": 2}],
    "VMIFGSM": [{"steps": 5}, {"steps": 2, "N": 3}],
    "VNIFGSM": [{"steps": 5}, {"steps": 2, "N": 3}],
    "SINIFGSM": [{"steps": 5}, {"steps": 2, "m": 3}],
    "OnePixel": [{"steps": 3}, {"steps": 2, "popsize": 4}, {"steps": 2, "pixels": 3}],
    "EOTPGD": [{"steps": 5, "eot_iter": 4}],
    "UPGD": [{"steps": 5, "eot_iter": 4}, {"steps": 2, "loss": "dlr"}],
    "PGDRS": [{"steps": 3}, {"steps": 3, "noise_batch_size": 3}],
    "PGDRSL2": [{"steps": 3}, {"steps": 3, "noise_batch_size": 3}],
    "BIM": [{}],
    "PIFGSM": [{"num_iter_set": 3}],
    "CW": [{"steps": 7}],
    "EADL1": [{"max_iterations": 20, "binary_search_steps": 2}],
    "EADEN": [{"max_iterations": 20, "binary_search_steps": 2}],
    "DeepFool": [{"steps": 4}],
    "SparseFool": [{"steps": 1}],
    "Pixle": [{"restarts": 3, "max_iterations": 4}, {"update_each_iteration": True, "max_iterations": 4}],
    "JSMA": [{"gamma": 0.1}],
    "AutoAttack": [{}, {"version": "rand"}, {"version": "plus"}],
}
EARLY = {"CW", "EADL1", "EADEN", "BIM"}
"""They may stop before their last step, or count their own steps."""
SLOW = {"AutoAttack"}
MINIMUM_NORM = {name: ATTACK_NORMS[name] for name in sorted(cost.MINIMUM_NORM)}
CASES = [
    pytest.param(name, given, marks=[pytest.mark.slow] if name in SLOW and given else [], id=f"{name}-{number}")
    for name in sorted(PROFILES)
    if not PROFILES[name].refused
    for number, given in enumerate(QUICK.get(name, [{}]))
]


class Stubborn(nn.Module):
    """Predicts class 0 whatever it sees, by logits that do move with the image."""

    def __init__(self, channels: int, classes: int = 10, side: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(channels * side**2, classes)
        self.base = nn.Parameter(torch.zeros(classes))
        with torch.no_grad():
            self.head.weight.mul_(0.01)
            self.base[0] = 3.0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.flatten(1)) + self.base
        return logits


def read(
    attacks: list[Any],
    norm: str = "linf",
    variants: Mapping[str, Any] = {"baseline": None},
    **evaluation: Any,
) -> Recipe:
    values = {
        "data": "digits",
        "model": "small_cnn",
        "threat": {"norm": norm, "eps": EPS[norm]},
        "variants": variants,
        "evaluate": {"attacks": attacks, **evaluation},
    }
    return parse_recipe(json.dumps(values))


def parameter(kind: str, use: Use, name: str) -> object:
    if name in use.parameters:
        return use.parameters[name]
    known = registry.parameters(registry.find("certificate" if kind == "certificate" else "attack", use.name))
    return next((one.default for one in known if one.name == name), None)


def counted(use: Use, norm: str, channels: int) -> float:
    """Return the passes over an image that the attack needs, as a run counts them."""
    model = Stubborn(channels).eval()
    x, y = torch.rand(IMAGES, channels, 8, 8), torch.zeros(IMAGES, dtype=torch.int64)
    outcome = attack_outcome(
        model,
        x,
        y,
        registry.create(registry.find("attack", use.name), use.parameters),
        Threat(norm, EPS[norm]),  # type: ignore[arg-type]
        clean=clean_outcome(model, x, y, batch_size=IMAGES, device=CPU),
        seed=0,
        label="cost",
        batch_size=IMAGES,
        device=CPU,
    )
    return (outcome.forwards + outcome.backwards) / IMAGES


def test_every_class_has_a_rule() -> None:
    assert {*RULES, "AutoAttack"} == {name for name, profile in PROFILES.items() if not profile.refused}


@pytest.mark.parametrize(("name", "given"), CASES)
def test_no_class_of_torchattacks_costs_more_than_is_said(name: str, given: dict[str, Any]) -> None:
    norm, channels = PROFILES[name].norms[0], PROFILES[name].channels or 1
    recipe = read([{f"torchattacks.{name}": given}], norm)
    (use,) = recipe.evaluate.attacks
    said = cost.one_attack_passes(use, parameter, facts_of(recipe))
    found = counted(use, norm, channels)
    assert found <= said
    if name not in EARLY:
        assert said <= found + 3, "a bound, and a close one"


@pytest.mark.parametrize(
    "attack", ["noise", {"noise": {"tries": 3}}, "fgsm", "pgd", {"pgd": {"steps": 5, "restarts": 3}}]
)
def test_robustkits_own_attacks_cost_what_is_said(attack: Any) -> None:
    recipe = read([attack])
    (use,) = recipe.evaluate.attacks
    assert counted(use, "linf", 1) == cost.one_attack_passes(use, parameter, facts_of(recipe))


@pytest.mark.parametrize(
    ("attack", "norm"),
    [*((name, norms[0]) for name, norms in MINIMUM_NORM.items()), ("fmn", "l1"), ("fgsm", "l0"), ("pgd", "l0")],
)
def test_attacks_that_never_stop_early_cost_what_is_said(attack: str, norm: str) -> None:
    for given in ({}, {"steps": 5, "restarts": 3}):
        recipe = read([{attack: given if attack != "fgsm" else {}}], norm)
        (use,) = recipe.evaluate.attacks
        assert counted(use, norm, 1) == cost.one_attack_passes(use, parameter, facts_of(recipe), norm)


def passes(run: Callable[[nn.Module], object], images: int) -> float:
    model = CountedModel(Stubborn(1)).eval()
    run(model)
    return (model.forwards + model.backwards) / images


def test_the_curve_is_counted() -> None:
    plain, curved = (cost.attack_passes(read([], eps_curve=eps), parameter) for eps in ([], [0, 0.1, 0.2, 0.1]))
    x, y = torch.rand(IMAGES, 1, 8, 8), torch.zeros(IMAGES, dtype=torch.int64)
    clean = clean_outcome(Stubborn(1).eval(), x, y, batch_size=IMAGES, device=CPU)

    def run(model: nn.Module) -> None:
        for attack in (Pgd(steps=evaluate.CURVE_STEPS), Noise(tries=evaluate.CURVE_TRIES)):
            security_curve(
                model, x, y, attack, "linf", [0, 0.1, 0.2, 0.1], clean=clean, seed=0, batch_size=IMAGES, device=CPU
            )

    assert curved - plain == pytest.approx(passes(run, IMAGES))


@pytest.mark.parametrize("images", [1, 2, 64])
def test_the_checks_are_counted(images: int) -> None:
    x, y = torch.rand(images, 1, 8, 8), torch.zeros(images, dtype=torch.int64)
    threat = Threat("linf", 0.1)
    assert cost.CHECKED == EXAMPLES

    def run(model: nn.Module) -> None:
        preflight(model, x, y, threat, seed=0, device=CPU)
        probes(model, x, y, threat, seed=0, device=CPU, surrogate=model)

    found = passes(run, images)
    assert found <= cost.CHECKS
    said = cost.attack_passes(read([], examples=images), parameter) - 1
    assert found <= said <= found + 12
    assert cost.attack_passes(read([]), parameter) == pytest.approx(1 + cost.CHECKS * 64 / 450)


def test_the_epochs_of_learned_scores_are_counted() -> None:
    recipe = parse_recipe(
        "name: c\ndata: digits\nmodel: small_cnn\ntrain: {epochs: 4}\nvariants:\n  robust: {defenses: [n_fgsm]}\n"
        "  a: {from: robust, compress: [hydra: {sparsity: 90%, epochs: 2}], train: {epochs: 3}}\n"
        "  b: {from: robust, compress: [hydra: {sparsity: 90%}]}\n"
        "  c: {from: robust, compress: [global_l1: {sparsity: 90%}]}\n"
    )
    passes = [cost.training_passes(variant, cost.parameter_of(recipe)) for variant in recipe.variants]
    assert passes == [4 * 5, (3 + 2) * 5, 5 * 5, 0]


def test_the_corruptions_are_counted() -> None:
    x, y = torch.rand(IMAGES, 1, 8, 8), torch.zeros(IMAGES, dtype=torch.int64)
    found = passes(lambda model: corruption_outcome(model, x, y, tuple(CORRUPTIONS), batch_size=1, device=CPU), IMAGES)
    plain, corrupted = (cost.attack_passes(read([], corruptions=on), parameter) for on in (False, True))
    assert found == cost.CORRUPTED
    assert corrupted - plain == pytest.approx(cost.CORRUPTED)


@pytest.mark.parametrize("use", ["interval", "randomized_smoothing", {"randomized_smoothing": {"n": 7, "n0": 3}}])
def test_the_certificates_are_counted(use: Any) -> None:
    x, y = torch.rand(IMAGES, 1, 8, 8), torch.zeros(IMAGES, dtype=torch.int64)
    recipe = read([], certify=[use])
    (known,) = recipe.evaluate.certify
    certificate = registry.create(registry.find("certificate", known.name), known.parameters)

    def run(model: nn.Module) -> None:
        # A model that counts cannot be traced: what it holds is.
        judged = model.model if known.name == "interval" else model
        outcome = certified_outcome(
            judged, x, y, certificate, Threat("linf", 0.1), seed=0, label="c", batch_size=IMAGES, device=CPU
        )
        told.append(outcome.forwards)

    told: list[int] = []
    counted_passes = passes(run, IMAGES)
    said = cost.attack_passes(recipe, parameter) - cost.attack_passes(read([]), parameter)
    assert said == pytest.approx(told[0] / IMAGES)
    if known.name != "interval":
        assert counted_passes == pytest.approx(said)


VARIANTS: dict[str, Any] = {
    "plain": {},
    "robust": {"defenses": ["n_fgsm"]},
    "bits": {"from": "plain", "defenses": [{"bit_depth": {"bits": 2}}]},
    "smooth": {"from": "plain", "defenses": [{"randomized_smoothing": {"samples": 5}}]},
    "joint": {"from": "plain", "defenses": [{"ensemble": {"members": ["robust"]}}]},
    "mixed": {"from": "plain", "defenses": [{"ensemble": {"members": ["robust", "bits", "joint"]}}]},
}


def test_wrapped_variants_are_attacked_twice_and_ask_as_many_networks_as_they_hold() -> None:
    def said(label: str, attacks: list[str]) -> float:
        recipe = read(attacks, variants=VARIANTS)
        return cost.attack_passes(recipe, parameter, recipe.variant(label))

    once, attacked = said("plain", []), said("plain", ["noise"]) - said("plain", [])
    assert said("plain", ["noise"]) == cost.attack_passes(read(["noise"]), parameter)
    expected = {"bits": (1, 2), "smooth": (5, 2), "joint": (2, 1), "mixed": (1 + 1 + 1 + 2, 2)}
    for label, (networks, ways) in expected.items():
        assert said(label, ["noise"]) == pytest.approx(networks * (once + ways * attacked)), label


def test_the_best_and_the_last_epoch_are_counted() -> None:
    found = read([], variants=VARIANTS)
    plain, robust = (cost.attack_passes(found, parameter, found.variant(label)) for label in ("plain", "robust"))
    split = split_of(torch.zeros(IMAGES, 1, 8, 8, dtype=torch.uint8), torch.zeros(IMAGES, dtype=torch.int64))

    def run(model: nn.Module) -> None:
        clean_loss_and_accuracy(model, split, CPU)
        robust_accuracy(model, split, Threat("linf", 0.1), CPU, seed=0)

    assert robust - plain == pytest.approx(2 * passes(run, IMAGES))
    assert cost.COMPARED == ROBUST_EXAMPLES


def test_what_is_not_known_of_the_data_is_taken_to_be_large() -> None:
    recipe = read([])
    other = recipe.model_copy(update={"data": Use(name="npz", parameters={"path": "x.npz", "size": 16}, label="d")})
    facts = facts_of(other)
    assert (facts.classes, facts.values, facts.test) == (1000, 3 * 16 * 16, 1)


def test_the_classes_of_an_image_folder_are_counted(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "train" / name).mkdir(parents=True)
    data = Use(name="image_folder", parameters={"root": str(tmp_path), "channels": "gray"}, label="d")
    facts = facts_of(read([]).model_copy(update={"data": data}))
    assert (facts.classes, facts.channels) == (3, 1)


def test_a_recipe_is_read_and_its_cost_told_without_torch() -> None:
    code = (
        "import sys\n"
        "from robustkit.recipe.cost import attack_passes\n"
        "from robustkit.recipe.schema import parse_recipe\n"
        "recipe = parse_recipe('{data: digits, model: {torchvision.vit_b_16: {image_size: 32}}, variants: {a: },'\n"
        "    'evaluate: {attacks: [torchattacks.VANILA, noise], certify: [interval, randomized_smoothing], '\n"
        "    'corruptions: true}}')\n"
        "attack_passes(recipe, lambda *_: 1)\n"
        "assert not {'torch', 'torchvision', 'torchattacks'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("defenses", "step"),
    [
        ("[]", 3),
        ("[fgsm]", 5),
        ("[fgsm_rs, awp]", 8),
        ("[fgsm, grad_align]", 20),
        ("[ensemble_training]", 8),
        ("[free: {replay: 4}]", 12),
        ("[free, awp]", 48),
        ("[mart: {steps: 5}]", 16),
        ("[trades]", 26),
        ("[pgd_training: {steps: 3, restarts: 2}, curriculum]", 15),
    ],
)
def test_passes_of_a_training_step(defenses: str, step: float) -> None:
    """A forward, twice that for the weights' gradients, and what the defenses add."""
    recipe = parse_recipe(
        f"data: digits\nmodel: small_cnn\ntrain: {{epochs: 2}}\nvariants: {{a: {{defenses: {defenses}}}}}"
    )
    assert cost.training_passes(recipe.variant("a"), cost.parameter_of(recipe)) == 2 * step
