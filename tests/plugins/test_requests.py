"""torchattacks pins an old `requests`; nothing ever imports it, so that any version will do."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires


def test_everything_runs_where_requests_cannot_be_imported() -> None:
    code = """
import sys
sys.modules["requests"] = None  # importing it raises from here on
import torch, robustkit
from robustkit.recipe.schema import parse_recipe
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
attacks = ["pgd", "torchattacks.PGD", "torchattacks.APGD", {"torchattacks.Square": {"n_queries": 20}}]
found = robustkit.evaluate(model, x, y, threat=robustkit.Threat("linf", 0.1), attacks=attacks)
assert set(found.attacks) == {"pgd", "torchattacks.PGD", "torchattacks.APGD", "torchattacks.Square"}
parse_recipe("data: cifar10\\nmodel: torchvision.resnet18\\nvariants: {a: }\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_robustkit_itself_asks_for_no_version_of_it() -> None:
    assert not [one for one in requires("robustkit") or [] if one.startswith("requests")]
