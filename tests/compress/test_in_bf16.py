"""Every way to prune, and what follows it, where trainings compute in bfloat16: as sparse, as exact, and it learns."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustkit import read_results
from robustkit.cli.group import run as cli

WEIGHTS = ("global_l1", "layer_l1", "random", "lamp", "snip", "grasp", "synflow", "taylor")
CHANNELS = ("channel_l2", "channel_l1", "channel_fpgm", "channel_bn_scale", "channel_taylor", "channel_random")
RECIPE = f"""\
name: lower
data: {{digits: {{limit: 900}}}}
model: {{small_cnn: {{widths: [8, 16]}}}}
threat: {{norm: linf, eps: 0.05}}
train: {{epochs: 4, batch_size: 64, optimizer: {{sgd: {{lr: 0.1, momentum: 0.9}}}}, precision: bf16}}
variants:
  robust: {{defenses: [pgd_training: {{steps: 2}}]}}
  $method:
    matrix: {{method: [{", ".join(WEIGHTS)}]}}
    from: robust
    compress: [$method: {{sparsity: 60%}}]
    train: {{epochs: 2}}
  cubic: {{from: robust, compress: [global_l1: {{sparsity: 60%, schedule: cubic}}], train: {{epochs: 2}}}}
  hydra: {{from: robust, compress: [hydra: {{sparsity: 60%, epochs: 2, batch_size: 64}}], train: {{epochs: 2}}}}
  n_m: {{from: robust, compress: [n_m], train: {{epochs: 2}}}}
  rewound: {{from: robust, compress: [global_l1: {{sparsity: 60%}}, rewind: {{epoch: 1}}], train: {{epochs: 2}}}}
  qat: {{from: robust, compress: [int8: {{qat: true, queries: 100}}], train: {{epochs: 2}}}}
  $channels:
    matrix: {{channels: [{", ".join(CHANNELS)}]}}
    from: robust
    compress: [$channels: {{sparsity: 25%}}]
    train: {{epochs: 2}}
  shrunk: {{from: channel_l2, compress: [shrink, recalibrate]}}
  int8: {{from: shrunk, compress: [int8: {{queries: 100}}]}}
evaluate: {{examples: 150, attacks: [fgsm], gallery: 0, latency: false, eps_curve: []}}
"""


@pytest.mark.slow
def test_every_way_to_compress_trains_in_bfloat16(tmp_path: Path) -> None:
    path = tmp_path / "lower.yaml"
    path.write_text(RECIPE)
    assert cli(["run", str(path), "--runs", str(tmp_path), "--quiet"]) == 0
    rows = {row.name: row for row in read_results(tmp_path / "lower" / "results.json").variants}
    assert len(rows) == len(WEIGHTS) + len(CHANNELS) + 8
    for name in (*WEIGHTS, "cubic", "hydra", "rewound"):
        assert rows[name].sparsity == pytest.approx(0.6, abs=0.002), name
    assert rows["shrunk"].parameters < 0.85 * rows["robust"].parameters
    for name, row in rows.items():
        # Random scores learn little in two epochs; chance is 10 %.
        assert row.clean.value >= (0.5 if name in ("random", "grasp") else 0.75), name
