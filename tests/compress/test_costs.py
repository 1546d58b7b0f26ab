"""What is measured of a model, what is said of it, and that the one never contradicts the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import robustkit
from robustkit import provenance
from robustkit.compress.latency import QUICK, THOROUGH, Effort
from robustkit.compress.memory import peak_activation_bytes
from robustkit.compress.timings import measure_timings
from robustkit.errors import RecipeError
from robustkit.honest import Made, cost_notes
from robustkit.models.build import build_model
from robustkit.recipe.plan import make_plan
from robustkit.recipe.schema import parse_recipe
from robustkit.recipe.spec import Use
from robustkit.report.costs import timing_rows
from robustkit.report.tables import ms_text
from robustkit.results import Latency, Results, Timing, VariantResult
from robustkit.speed import against, compared, distinguishable
from robustkit.stats import clopper_pearson

IMAGE = 4 * 4 * 4
"""Bytes of one image of 1x4x4 floats."""


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.first(x)
        return kept + self.second(kept)


class Viewed(nn.Module):
    """Views of weights and of images hold nothing of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(100, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.t()


class Dropping(nn.Module):
    """What is let go of no longer counts; what was largest in between does."""

    def forward(self, x: Tensor) -> Tensor:
        large = x.repeat(1, 10, 1, 1)
        small = large.sum(1)
        del large
        return small.repeat(1, 2, 1)


@pytest.mark.parametrize(
    ("model", "held"),
    [
        # The image, the convolution's two channels, and ReLU's copy of them.
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)), IMAGE * 5),
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(32, 3)), IMAGE * 3 + 12),
        (Residual(), IMAGE * 4),
        (Viewed(), IMAGE + 400),
        (Dropping(), IMAGE * 12),
        (nn.Flatten(), IMAGE),
    ],
    ids=["chain", "in place", "residual", "views", "dropped", "nothing"],
)
def test_peak_activations_are_what_is_alive_at_once(model: nn.Module, held: int) -> None:
    model.train()
    assert peak_activation_bytes(model, (1, 4, 4)) == held
    assert model.training


def test_a_residual_network_holds_a_few_of_its_largest_maps() -> None:
    model = build_model(
        Use(name="resnet18", parameters={"width": 8}, label="m"),
        shape=(3, 32, 32),
        classes=10,
        mean=[0.5] * 3,
        std=[1.0] * 3,
    )
    once = peak_activation_bytes(model, (3, 32, 32))
    block = 8 * 32 * 32 * 4
    image = 3 * 32 * 32 * 4
    assert 3 * block <= once <= 5 * block + 2 * image
    assert peak_activation_bytes(model, (3, 32, 32)) == once


@pytest.mark.parametrize(
    ("effort", "slowest", "runs"),
    [
        (QUICK, 0.001, 50),
        (QUICK, 20.0, 25),
        (QUICK, 2000.0, 5),
        (THOROUGH, 0.1, 200),
        (THOROUGH, 10.0, 100),
        (THOROUGH, 100.0, 50),
        (THOROUGH, 299.0, 50),
        (THOROUGH, 1000.0, 15),
        (THOROUGH, 60_000.0, 5),
    ],
)
def test_at_least_fifty_runs_unless_they_take_too_long(effort: Effort, slowest: float, runs: int) -> None:
    assert effort.runs(slowest) == runs


class Watching(nn.Module):
    def __init__(self, name: str, seen: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.name, self.seen, self.weight = name, seen, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.name, torch.get_num_threads(), len(x)))
        return x.flatten(1)[:, :2] * self.weight


def test_each_number_of_threads_and_batch_is_measured_in_turn() -> None:
    before, seen = torch.get_num_threads(), []
    few = Effort(least=4, most=4, seconds=1.0, cap=9.0)
    told = measure_timings(
        {name: Watching(name, seen) for name in "ab"},
        (1, 2, 2),
        torch.device("cpu"),
        ("eager",),
        threads=(1, 2),
        batch_sizes=(1, 8),
        effort=few,
    )
    assert torch.get_num_threads() == before
    wanted = [(threads, batch) for threads in (1, 2) for batch in (1, 8)]
    assert [(one.threads, one.batch, one.runs) for one in told.found["a"]] == [(*both, 4) for both in wanted]
    each = 2 * 3 + 2 * 4
    for number, (threads, batch) in enumerate(wanted):
        timed = seen[number * each + 6 : (number + 1) * each]
        assert timed == [("a", threads, batch), ("b", threads, batch)] * 4
    assert not told.untimed


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return (x if float(x.sum()) > 0 else -x).flatten(1) * self.weight


def test_a_runtime_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustkit.compress.runtimes.missing_onnx_packages", lambda: ["onnxruntime"])
    monkeypatch.setattr("shutil.which", lambda name: None)
    told = measure_timings(
        {"a": Branching()}, (1, 2, 2), torch.device("cpu"), ("onnxruntime", "inductor"), threads=(1,), batch_sizes=(1,)
    )
    assert told.found == {"a": []}
    assert told.untimed["a"]["onnxruntime"] == "onnxruntime is not installed: pip install 'robustkit[onnx]'"
    assert "C++ compiler" in told.untimed["a"]["inductor"]


@pytest.mark.slow
def test_every_runtime_runs_what_it_can_and_says_what_not() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model = build_model(
        Use(name="small_cnn", parameters={"widths": [4]}, label="m"), shape=(1, 8, 8), classes=3, mean=[0.5], std=[1.0]
    )
    runtimes = ("eager", "inductor", "onnxruntime")
    told = measure_timings(
        {"plain": model, "branching": Branching()},
        (1, 8, 8),
        torch.device("cpu"),
        runtimes,
        threads=(1,),
        batch_sizes=(2,),
        effort=Effort(least=3, most=3, seconds=1.0, cap=9.0),
    )
    assert [one.runtime for one in told.found["plain"]] == list(runtimes)
    assert [one.runtime for one in told.found["branching"]] == ["eager"]
    assert set(told.untimed) == {"branching"}
    assert set(told.untimed["branching"]) == {"inductor", "onnxruntime"}


def latency(median: float, spread: float = 0.05) -> Latency:
    return Latency(median=median, q1=median * (1 - spread), q3=median * (1 + spread), p95=2 * median, runs=50)


def row(name: str, *, ms: float | None = 10.0, parent: str | None = None, **more: object) -> VariantResult:
    values: dict[str, object] = {
        "name": name,
        "seed": 0,
        "parent": parent,
        "clean": clopper_pearson(90, 100),
        "worst": clopper_pearson(50, 100),
        "parameters": 1000,
        "nonzero": 1000,
        "bytes": 4000,
        "gzip_bytes": 3900,
        "macs": 8000,
        "channels": 20,
        "zero_channels": 0,
        "latency": {} if ms is None else {"batch_1": latency(ms), "batch_256": latency(100 * ms)},
    }
    return VariantResult.model_validate({**values, **more})


def test_latencies_differ_where_their_quartiles_lie_apart() -> None:
    assert not distinguishable(latency(10), latency(10.9))
    assert distinguishable(latency(10), latency(12))
    assert against(latency(5), latency(13)) == "2.6 times faster"
    assert against(latency(13), latency(5)) == "2.6 times slower"
    assert against(latency(10), latency(10.9)) == "not distinguishable"
    exact = [latency(ms).model_copy(update={"q1": ms, "q3": ms}) for ms in (10, 10.4)]
    assert against(*exact) == "4% faster"
    assert against(*reversed(exact)) == "4% slower"


def timing(ms: float, runtime: str = "eager", threads: int = 1) -> Timing:
    return Timing(runtime=runtime, threads=threads, batch=1, **latency(ms).model_dump())


def test_timings_stand_beside_the_parents_or_the_first_variants() -> None:
    rows = compared(
        [
            row("base", timings=[timing(10), timing(6, "inductor")]),
            row("slim", parent="base", timings=[timing(4), timing(5.9, "inductor"), timing(1, "onnxruntime")]),
            row("other", timings=[timing(20)]),
        ]
    )
    assert [one.versus for one in rows[0].timings] == [None, None]
    eager, inductor, onnx = rows[1].timings
    assert (eager.versus, eager.ratio, eager.distinguishable) == ("base", 2.5, True)
    assert (inductor.versus, inductor.distinguishable) == ("base", False)
    assert onnx.versus is None, "the parent was not timed there"
    assert (rows[2].timings[0].versus, rows[2].timings[0].ratio) == ("base", 0.5)
    told = [cells[-1] for cells in timing_rows(Results(variants=rows))]
    assert told[2:5] == ["2.50 times as fast as base", "not distinguishable from base", ""]


SPARSE = {"sparsity": 0.8, "nonzero": 200, "gzip_bytes": 1000, "parent": "base"}
NOTES: list[tuple[str, dict[str, object], list[str], list[str]]] = [
    (
        "no faster",
        SPARSE,
        ["sparse, not faster: 80% of the weights are zero", "not distinguishable at batch 1 and 256"],
        [],
    ),
    ("slower", {**SPARSE, "ms": 20.0}, ["sparse, not faster", "2 times slower"], []),
    ("faster by chance", {**SPARSE, "ms": 5.0}, ["2 times faster", "measure again"], ["not faster"]),
    (
        "not timed",
        {**SPARSE, "ms": None},
        ["no speed-up expected", "latency was not compared"],
        ["not faster", "measured"],
    ),
    (
        "masked",
        {**SPARSE, "sparsity": 0.5, "zero_channels": 10},
        ["masked, not yet removed, not faster", "10 of 20 channels have no weight left"],
        ["sparse"],
    ),
    (
        "removed",
        {"parent": "base", "macs": 2000, "bytes": 1000, "ms": 5.0},
        ["4 times fewer MACs and 4 times fewer bytes than base", "2 times faster at batch 1 and 256"],
        ["sparse", "masked"],
    ),
    (
        "removed, no faster",
        {"parent": "base", "macs": 2000, "bytes": 1000},
        ["4 times fewer MACs", "not distinguishable at batch 1 and 256"],
        ["faster"],
    ),
]


@pytest.mark.parametrize(("given", "says", "never"), [one[1:] for one in NOTES], ids=[one[0] for one in NOTES])
def test_what_is_said_is_what_was_measured(given: dict[str, object], says: list[str], never: list[str]) -> None:
    variant = row("small", **given)  # type: ignore[arg-type]
    (told,) = cost_notes(variant, [row("base"), variant], Made(["some_method"]))
    assert all(text in told for text in says), told
    assert not any(text in told for text in never), told
    assert cost_notes(variant, [row("base"), variant], Made()) == []


QUANTIZED = {"parent": "base", "bytes": 1000, "gzip_bytes": 900, "sparsity": 0.02}


def _told(made: Made, base: VariantResult | None = None, **given: object) -> list[str]:
    variant = row("small", **{**QUANTIZED, **given})  # type: ignore[arg-type]
    return cost_notes(variant, [base or row("base"), variant], made)


def test_a_simulated_model_is_said_to_be_slower_only_where_it_is() -> None:
    (slow,) = _told(Made(["int8"], 8), ms=30.0)
    assert slow.startswith("int8, simulated in floats by eager PyTorch, slower until lowered: 4 times fewer bytes")
    assert "3 times slower at batch 1 and 256" in slow
    assert "not timed" in slow
    (level,) = _told(Made(["int8"], 8))
    assert "slower" not in level
    (low,) = _told(Made(["int8"], 4), ms=30.0)
    assert "nothing here computes in 4 bits" in low


def test_what_inductor_brings_is_said_with_what_the_processor_has() -> None:
    base = row("base", timings=[timing(10, "inductor"), timing(6, "inductor", 2)])
    times = [timing(4, "inductor"), timing(6, "inductor", 2)]
    (told,) = _told(Made(["int8"], 8, ["avx512_vnni"]), base, ms=30.0, timings=times)
    wanted = "processor with VNNI: 1 thread: 2.5 times faster at batch 1; 2 threads: not distinguishable at batch 1"
    assert wanted in told
    (told,) = _told(Made(["int8"], 8), base, ms=30.0, timings=times)
    assert "processor without VNNI" in told


def test_an_onnx_file_is_compared_across_runtimes_by_name() -> None:
    base = row("base", timings=[timing(5, "onnxruntime")])
    more = {"runtime": "onnxruntime", "ms": 2.0, "timings": [timing(2, "onnxruntime")]}
    (told,) = _told(Made(["onnx"], 8), base, **more)
    assert "measured in ONNX Runtime against base in eager PyTorch: 5 times faster at batch 1 and 256" in told
    assert "against base in ONNX Runtime too: 1 thread: 2.5 times faster at batch 1" in told
    (told,) = _told(Made(["onnx"]), row("base"), runtime="onnxruntime", bytes=5000, sparsity=0.0)
    assert "1.2 times more bytes than base" in told


def test_milliseconds_are_no_powers_of_ten() -> None:
    assert [ms_text(value) for value in (0.01234, 39.04, 999.4, 999.6, 6570.2)] == [
        "0.0123",
        "39",
        "999",
        "1000",
        "6570",
    ]
    (told,) = _told(Made(["onnx"]), runtime="onnxruntime", bytes=3990, sparsity=0.0)
    assert "as many bytes as base" in told


def test_a_pattern_is_said_to_need_other_hardware() -> None:
    variant = row("small", **SPARSE)  # type: ignore[arg-type]
    assert "NVIDIA" in cost_notes(variant, [row("base"), variant], Made(["n_m"]))[1]


def test_the_record_names_the_processors_extensions_for_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "model name\t: A CPU\nflags\t\t: fpu avx2 avx_vnni sse avx512f avx512_vnni amx_tile amx_int8\n"
    monkeypatch.setattr(provenance, "_read", lambda path: told)
    found = provenance.cpu()
    assert found["name"] == "A CPU"
    assert found["extensions"] == ["avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_tile", "amx_int8"]
    assert {"torch", "torchao", "onnxruntime"} <= set(provenance.PACKAGES)


RECIPE = """\
name: costs
data: {digits: {limit: 400}}
model: {small_cnn: {widths: [6]}}
threat: {norm: linf, eps: 0.05}
train: {epochs: 1, batch_size: 64}
variants:
  base:
  sparse: {from: base, compress: [layer_l1: {sparsity: 50%}]}
evaluate: {examples: 20, attacks: [noise], latency: LATENCY, gallery: 0}
gates: [activation_bytes(sparse) <= activation_bytes(base), activation_bytes(base) < 1kB]
"""


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("ful", "did you mean 'full'?"),
        ("[eager, onxruntime]", "did you mean 'onnxruntime'?"),
        ("3", "true, false, full, or a list of eager, inductor, onnxruntime"),
        ("[eager, eager]", "a list of different runtimes"),
        ("[]", "a list of different runtimes"),
    ],
)
def test_a_wrong_runtime_is_told_at_its_place(value: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(RECIPE.replace("LATENCY", value))
    assert says in str(caught.value)
    assert "recipe.yaml:9:" in str(caught.value)


def test_the_usual_latency_keeps_its_key_and_the_table_has_its_own() -> None:
    def keys(value: str) -> set[str]:
        recipe = parse_recipe(RECIPE.replace("LATENCY", value))
        return {step.key for step in make_plan(recipe, "data", lambda kind, use: "1").steps if step.kind == "latency"}

    assert len(keys("true") | keys("full") | keys("[eager]") | keys("eager")) == 3
    assert keys("full") == keys("[eager, inductor, onnxruntime]")
    assert keys("eager") == keys("[eager]")
    assert not keys("false")


def test_a_run_reports_what_its_variants_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustkit.compress.timings.thread_counts", lambda device: (1,))
    monkeypatch.setattr("robustkit.compress.latency.Effort.runs", lambda self, slowest: 5)
    robustkit.run(RECIPE.replace("LATENCY", "[eager]"), runs=tmp_path)
    found = robustkit.read_results(tmp_path / "costs" / "results.json")
    base, sparse = found.variants
    assert sparse.activation_bytes == base.activation_bytes
    assert [(one.runtime, one.threads, one.batch, one.runs) for one in sparse.timings] == [
        ("eager", 1, 1, 5),
        ("eager", 1, 256, 5),
    ]
    assert {one.versus for one in sparse.timings} == {"base"}
    assert set(sparse.latency) == {"batch_1", "batch_256"}
    assert base.cost_notes == []
    assert "50% of the weights are zero" in sparse.cost_notes[0]
    assert [gate.holds for gate in found.gates] == [True, False]
    for name in ("report.md", "report.html"):
        text = (tmp_path / "costs" / name).read_text()
        assert "Size and speed" in text
        assert "Latency by runtime" in text
        assert "peak activations" in text
    assert "activation_bytes" in (tmp_path / "costs" / "results.csv").read_text().splitlines()[0]
