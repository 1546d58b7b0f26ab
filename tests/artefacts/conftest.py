"""A small run on real digits: a model with removed channels under two seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

import robustkit

RECIPE = """\
name: tiny
seed: [3, 4]
data: {digits: {limit: 500}}
model: {small_cnn: {widths: [6, 8]}}
threat: {norm: linf, eps: 0.05}
train: {epochs: 4, batch_size: 32}
variants:
  slim: {compress: [channel_l2: {sparsity: 25%}, shrink]}
evaluate: {examples: 40, attacks: [noise], latency: false}
"""


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder."""
    folder = tmp_path_factory.mktemp("artefacts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBUSTKIT_CACHE", str(folder / "cache"))
        # Its report is nobody's concern here.
        patch.setattr("robustkit.pipeline._write_report", lambda folder: folder / "report.html")
        robustkit.run(RECIPE, runs=folder)
    return folder / "tiny"


@pytest.fixture
def stored(run: Path) -> Path:
    """The model's file, of the first seed."""
    row = robustkit.read_results(run / "results.json").variants[0]
    assert row.model is not None
    return run / row.model
