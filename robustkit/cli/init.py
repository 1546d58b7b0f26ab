"""`robustkit init`: a recipe to start from."""

from __future__ import annotations

from pathlib import Path

import click

from robustkit.errors import UsageError
from robustkit.store import write_atomic

STARTER = """\
# robustkit run {name}          `robustkit check {name}` shows the plan first; `robustkit list` what there is.
seed: 0                         # or [0, 1, 2]: each variant once a seed

data: {{digits: {{size: 16}}}}    # real digits, embedded; or cifar10, fashion_mnist, image_folder: {{root: ...}}, npz
model: {{small_cnn: {{widths: [16, 32, 32]}}}}
threat: {{norm: linf, eps: 0.1}}  # of the range [0, 1]; for 8-bit images write 8/255

train:
  epochs: 10
  batch_size: 64
  optimizer: {{sgd: {{lr: 0.1, momentum: 0.9}}}}
  schedule: one_cycle

variants:
  baseline:
  robust: {{defenses: [n_fgsm]}}                  # adversarial training, cheap
  robust-pruned:
    from: robust                                # starts from its weights and keeps its defenses
    compress: [global_l1: {{sparsity: 80%}}]      # of all weights, in total
    train: {{epochs: 4}}

evaluate:
  attacks: [noise, fgsm, pgd: {{steps: 20}}, cascade]
  eps_curve: [0, 0.05, 0.1, 0.2]

gates:                                          # exit code 3 when one does not hold
  - worst(robust) >= worst(baseline) + 20pp
"""


@click.command("init", epilog="Example: robustkit init my-recipe.yaml")
@click.argument("file", type=click.Path(path_type=Path), default=Path("recipe.yaml"))
def command(file: Path) -> None:
    """Write a commented starter recipe to FILE (default recipe.yaml); an existing file is not touched."""
    if file.exists():
        raise UsageError(f"{file} exists already; choose another name")
    write_atomic(file, STARTER.format(name=file).encode())
    click.echo(f"{file} written; next: robustkit run {file}")
