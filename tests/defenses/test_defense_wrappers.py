"""Inference wrappers: what they compute, what their views see, how they are stored, attacked and reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import median_filter as reference
from torch import Tensor, nn

import robustkit
from robustkit.attacks.adaptive import Through
from robustkit.attacks.gradient import Pgd
from robustkit.defenses.inference import BitDepth, Jpeg, MedianFilter, mean_filter, median_filter, reduce_bit_depth
from robustkit.defenses.sampled import McDropout, RandomizedSmoothing, mean_answer
from robustkit.errors import UsageError
from robustkit.evaluation import seen
from robustkit.evaluation.both import on_view
from robustkit.evaluation.ways import adaptive_of
from robustkit.models.wrapped import Wrapped, view_of
from robustkit.results import Flag
from robustkit.train.hooks import Defense

WRAPPERS: list[Defense] = [
    BitDepth(2),
    Jpeg(50),
    MedianFilter(3),
    RandomizedSmoothing(0.2, 3),
    McDropout(0.5, 3),
]
every = pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda one: type(one).__name__)

RECIPE = """\
name: wrapped
data: {digits: {limit: 300}}
model: {small_cnn: {widths: [4, 8]}}
threat: {norm: linf, eps: 0.1}
train: {epochs: 2, batch_size: 64, optimizer: {sgd: {lr: 0.1, momentum: 0.9}}}
variants:
  baseline:
  bits: {from: baseline, defenses: [bit_depth: {bits: 1}]}
  pruned: {from: bits, compress: [global_l1: {sparsity: 50%}]}
evaluate: {examples: 40, attacks: [pgd: {steps: 3}], latency: false}
"""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_bit_depth_by_hand() -> None:
    found = reduce_bit_depth(torch.tensor([0.0, 0.1, 0.2, 0.5, 0.9, 1.0]), 2)
    torch.testing.assert_close(found, torch.tensor([0, 0, 1, 2, 3, 3]) / 3)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_median_is_that_of_scipy(size: int) -> None:
    expected = reference(images()[0, 0].numpy(), size=size, mode="mirror")
    np.testing.assert_array_equal(median_filter(images(), size)[0, 0].numpy(), expected)
    assert mean_filter(images(), size).shape == (4, 1, 8, 8)


def test_mean_answer_is_the_mean_of_probabilities() -> None:
    logits = [torch.randn(5, 3) for _ in range(4)]
    expected = torch.stack([one.softmax(1) for one in logits]).mean(0)
    torch.testing.assert_close(mean_answer(logits).softmax(1), expected)


@every
def test_answers_repeat_and_do_not_depend_on_the_batch(wrapper: Defense) -> None:
    wrapped, x = Wrapped(network(), [wrapper]).eval(), images()
    assert torch.equal(wrapped(x), wrapped(x))
    torch.testing.assert_close(wrapped(x)[1:2], wrapped(x[1:2]))
    assert not torch.allclose(wrapped(x), network()(x), atol=1e-4)
    assert torch.equal(wrapped.plain(x), network()(x))


@every
def test_the_view_has_gradients_and_judges_alike(wrapper: Defense) -> None:
    wrapped, x = Wrapped(network(), [wrapper]).eval(), images().requires_grad_()
    view = wrapped.view()
    (gradient,) = torch.autograd.grad(view(x).logsumexp(1).sum(), x)
    assert (gradient.abs().flatten(1).amax(1) > 0).all()
    if isinstance(wrapper, RandomizedSmoothing | McDropout):
        assert not torch.equal(view(x), view(x))
    else:
        assert torch.equal(view(x), wrapped(x))


def test_jpeg_of_best_quality_is_close_and_parameters_are_checked() -> None:
    smooth = torch.linspace(0, 1, 8).expand(1, 1, 8, 8)
    torch.testing.assert_close(Jpeg(100)._purify(smooth), smooth, atol=0.02, rtol=0)
    for mistake in (lambda: Jpeg(0), lambda: BitDepth(9)):
        with pytest.raises(UsageError):
            mistake()


def test_what_survives_by_hand() -> None:
    clean = np.array([True, True, True, False])
    found = adaptive_of(clean, [(clean, np.array([True, False, False, False]))])
    assert found is not None
    assert (found.naive.value, found.adaptive.value) == (0.75, 0.25)
    assert "33% of its robustness survives" in str(found)
    assert adaptive_of(clean, []) is None


def test_a_view_may_have_other_gradients_than_finite_differences() -> None:
    meant, other = Flag(id="P11", severity="wrong", message="m"), Flag(id="P9", severity="wrong", message="n")
    assert [flag.severity for flag in on_view([meant, other])] == ["note", "wrong"]


def test_a_run_stores_attacks_and_reports_wrappers(tmp_path: Path) -> None:
    results = robustkit.run(RECIPE, runs=tmp_path)
    rows = {row.name: row for row in results.variants}
    assert rows["baseline"].adaptive is None
    for name in ("bits", "pruned"):
        found = rows[name].adaptive
        assert found is not None
        assert rows[name].worst.value <= min(found.naive.value, found.adaptive.value)
        assert any("survives" in note for note in rows[name].notes)
        assert "wrong" not in {flag.severity for flag in rows[name].flags if flag.id == "P11"}
    assert "inference wrapper" in (tmp_path / "wrapped" / "report.md").read_text()
    loaded = [robustkit.load(path) for path in sorted((tmp_path / "wrapped" / "steps").glob("*/model.safetensors"))]
    wrapped = [one for one in loaded if isinstance(one, Wrapped)]
    assert len(wrapped) == 2
    for one in wrapped:
        assert torch.equal(one(images()), one.plain(reduce_bit_depth(images(), 1)))


DIES = """\
from dataclasses import dataclass
from pathlib import Path

CALLS = Path(__file__).with_name("calls")


@dataclass(frozen=True)
class Dies:
    def __call__(self, model, x, y, threat, *, generator):
        calls = CALLS.read_text() if CALLS.exists() else ""
        way = "a" if type(model).__name__ == "CountedView" else "n"
        if calls.endswith("aa") and not CALLS.with_name("died").exists():
            CALLS.with_name("died").touch()
            raise ValueError("the machine goes down")
        CALLS.write_text(calls + way)
        return (x + 0.1).clamp(0, 1)
"""


def test_a_stopped_attack_on_a_wrapped_model_goes_on_in_its_second_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen, "SAVE_EVERY", 0.0)
    (tmp_path / "dies.py").write_text(DIES)
    head, _ = RECIPE.split("variants:")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"{head}variants:\n  bits: {{defenses: [bit_depth: {{bits: 4}}]}}\n"
        "evaluate: {examples: 40, batch_size: 2, attacks: ['dies.py:Dies'], latency: false}\n"
    )
    with pytest.raises(robustkit.RobustkitError, match="goes down"):
        robustkit.run(recipe, runs=tmp_path)
    row = robustkit.run(recipe, runs=tmp_path).variants[0]
    batches = -(-round(row.clean.value * row.clean.n) // 2)
    assert batches > 3
    assert (tmp_path / "calls").read_text() == "n" * batches + "a" * batches, "no batch was attacked twice"
    assert not list(tmp_path.glob("wrapped/steps/*/partial*"))


def test_evaluate_attacks_a_wrapped_model_through_its_view_too() -> None:
    """Rounding to two levels has no gradient: attacked as deployed alone, it would look robust."""
    model = network()
    x = images()
    wrapped = Wrapped(model, [BitDepth(1)]).eval()
    y = wrapped(x).argmax(1)
    threat = robustkit.Threat("linf", 0.5)
    found = robustkit.evaluate(wrapped, x, y, threat=threat, attacks=["pgd"])
    through = robustkit.evaluate(wrapped, x, y, threat=threat, attacks={"pgd": Through(Pgd(), view_of)})
    assert through.worst.value < 1
    assert found.worst.value <= through.worst.value
    audited = robustkit.evaluate(wrapped, x, y, threat=threat, attacks=["noise"], audit=2)
    assert audited.audit is not None
