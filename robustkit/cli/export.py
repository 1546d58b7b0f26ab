"""`robustkit export`: a variant's model as a file for other programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command("export", epilog="Example: robustkit export runs/quickstart baseline --format onnx")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("variant")
@click.option("--format", "format_", envvar="ROBUSTKIT_EXPORT_FORMAT", required=True, help="safetensors, onnx or pt2.")
@click.option("--int8", envvar="ROBUSTKIT_EXPORT_INT8", is_flag=True, help="Quantize a float variant first.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: RUN/exports/VARIANT-seedN.FORMAT.")
@click.option("--seed", type=int, help="Of the variant; default: the run's first.")
@click.option("--trust-plugins", is_flag=True, help="Let the run's own code for data and models run.")
@click.option("--json", "as_json", envvar="ROBUSTKIT_EXPORT_JSON", is_flag=True, help="Print JSON.")
def command(
    run: Path,
    variant: str,
    format_: str,
    int8: bool,
    out: Path | None,
    seed: int | None,
    trust_plugins: bool,
    as_json: bool,
) -> None:
    """Write the model of VARIANT of RUN (a run's folder), checked against PyTorch on the run's test images.

    The file takes images in [0, 1] in batches of any size and holds no image. safetensors is for robustkit.load, onnx
    for ONNX Runtime and others (needs the extra [onnx]), pt2 for torch.export.load. --int8 quantizes with training
    images of the run; a variant that is int8 is written as it is, without it.
    """
    from robustkit.artefacts import export

    found = export(run, variant, format_, int8=int8, out=out, seed=seed, trust_plugins=trust_plugins)
    if as_json:
        record = {
            "path": str(found.path),
            "variant": found.variant,
            "seed": found.seed,
            "format": found.format,
            "bytes": found.bytes,
            "images": found.agreement.images,
            "largest_difference": found.agreement.difference,
        }
        if found.changed is not None:
            record["int8"] = asdict(found.changed)
        click.echo(json.dumps(record, indent=2))
        return
    click.echo(
        f"{found.path}: {found.variant}, seed {found.seed}, {found.bytes:,} bytes; on {found.agreement.images} test "
        f"images logits are within {found.agreement.difference:.1e} of the model's, predictions equal"
    )
    if found.changed is not None:
        click.echo(
            f"int8 gives another class than the float model for {found.changed.predictions} of {found.changed.images} "
            f"test images; ranges from {found.changed.calibration_images} training images, sha256 "
            f"{found.changed.calibration_sha256[:16]}"
        )
