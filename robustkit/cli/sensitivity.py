"""`robustkit sensitivity`: how much does each layer bear?"""

from __future__ import annotations

from pathlib import Path

import click

from robustkit.errors import UsageError
from robustkit.params import parse_number


@click.command("sensitivity", epilog="Example: robustkit sensitivity runs/fashion-mnist n-fgsm --method channel_l2")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("variant")
@click.option("--method", default="global_l1", show_default=True, help="E.g. taylor, random, channel_l2.")
@click.option("--sparsities", default="50%,80%,90%,95%", show_default=True, help="Of one layer at a time.")
@click.option("--examples", type=click.IntRange(min=1), default=500, show_default=True, help="Validation images.")
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Of the PGD attack.")
@click.option("--seed", type=int, help="Of the variant; default: the run's first.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder; default: RUN/sensitivity.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps; auto: cuda if it is there.")
@click.option("--trust-plugins", is_flag=True, help="Let the run's own code for data and models run.")
@click.option("--json", "as_json", envvar="ROBUSTKIT_SENSITIVITY_JSON", is_flag=True, help="Print JSON.")
def command(
    run: Path,
    variant: str,
    method: str,
    sparsities: str,
    examples: int,
    steps: int,
    seed: int | None,
    out: Path | None,
    device: str,
    trust_plugins: bool,
    as_json: bool,
) -> None:
    """Prune one layer of VARIANT of RUN (a run's folder) at a time, without training, and attack the rest.

    Prints a table and writes JSON and a chart (SVG, PNG): attacked and clean accuracy on validation images, by layer
    and sparsity. Weights are pruned by layer, channels by group of coupled layers.
    """
    shares = _shares(sparsities)
    from rich.console import Console
    from rich.progress import Progress

    from robustkit.report.sensitivity import POINTS, table
    from robustkit.scan import scan_layers

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"pruning {variant}", total=None)

        def moved(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        found = scan_layers(
            run,
            variant,
            method,
            sparsities=shares,
            examples=examples,
            steps=steps,
            seed=seed,
            out=out,
            device=device,
            trust_plugins=trust_plugins,
            on_progress=moved,
        )
    if as_json:
        click.echo(found.sensitivity.model_dump_json(indent=2))
        return
    click.echo(f"{found.variant}, seed {found.seed}: attacked (clean) accuracy in %, one layer pruned by {method}\n")
    click.echo(table(found.sensitivity))
    click.echo(f"\nbears: the sparsity up to which attacked accuracy falls by {100 * POINTS:g} points at most")
    click.echo("\n".join(map(str, found.files)))


def _shares(text: str) -> list[float]:
    """Return the sparsities of an option: `50%,80%` or `0.5,0.8`."""
    found = [parse_number(part) for part in text.split(",")]
    shares = [one for one in found if one is not None and 0 < one < 1]
    if len(shares) != len(found):
        raise UsageError(f"--sparsities {text!r}: shares between 0 and 1 with commas between, e.g. 50%,80%,90%")
    return shares
