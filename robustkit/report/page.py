"""report.html and report.md from the same values."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from robustkit.report.costs import COST_HEAD, COST_NOTE, TIMING_HEAD, TIMING_NOTE, cost_rows, timing_rows
from robustkit.report.fronts import FRONT_HEAD, FRONT_NOTE, front_rows
from robustkit.report.gallery import Picture
from robustkit.report.pareto import COSTS
from robustkit.report.poisoning import FILTER_HEAD, FILTER_NOTE, TOLERANCE_NOTE, filter_rows, tolerance_table
from robustkit.report.tables import (
    CERTIFIED_HEAD,
    attack_labels,
    beside,
    beside_head,
    certificate_labels,
    certified_rows,
    corruption_names,
    corruption_rows,
    count_text,
    display_name,
    distance_rows,
    eps_text,
    failed_name,
    gate_text,
    latency_text,
    multiple_seeds,
    paired_text,
    percent,
    plain_rows,
    rate_text,
    size_text,
    spreads,
    tree_order,
    within_noise,
)
from robustkit.report.verdict import verdict
from robustkit.results import Results, VariantResult

DISTANCE_HEAD = ("variant", "attack", "norm", "median", "found")
CAPTIONS = {
    "tradeoff": "Worst case against clean accuracy, with 95 % intervals; arrows lead from a parent to its child.",
    "curves": "Security curves: accuracy under PGD as eps grows, with 95 % bands; dashed: random noise of that size; "
    "dash-dotted steps: the whole curve of a minimum-norm attack, from its distances.",
    "size": "Worst case against size and speed; ringed and joined, seed by seed: the Pareto front of each cost.",
    "attacks": "Accuracy (%) under each attack; outlined: the strongest attack of each row.",
    "classes": "Worst-case accuracy (%) of each class; outlined: the worst class of each row.",
    "training": "Training: loss, clean and attacked accuracy on the validation split.",
}

CERTIFIED_NOTE = (
    "Certified accuracy is a lower bound of robust accuracy, the worst case over attacks an upper one; the truth lies "
    "between the two where both are of the same classifier. Randomized smoothing certifies the smoothed classifier, "
    "which answers by a vote under noise, and not the model that the attacks are on. The radius is in the norm of the "
    "threat for interval and in l2 for randomized smoothing, 0 where the label is not certain."
)
CORRUPTIONS_NOTE = (
    "Accuracy (%) under noise, blur, weather and digital corruptions, the mean of severities 1 to 5 (after Hendrycks & "
    "Dietterich 2019); the same corrupted images for every variant. No adversary is involved."
)


def context(
    run: Path, results: Results, figures: Mapping[str, str], pictures: list[Any], recipe: str
) -> dict[str, Any]:
    """Return what the templates read."""
    rows = tree_order(results)
    return {
        "results": results,
        "name": results.name or run.name,
        "rows": rows,
        "labels": attack_labels(results),
        "proven": certificate_labels(results),
        "corrupted": corruption_names(results),
        "verdict": verdict(results),
        "spreads": spreads(results),
        "seeds": multiple_seeds(results),
        "figures": {name: _unique_ids(svg, name) for name, svg in figures.items()},
        "captions": CAPTIONS,
        "pictures": pictures,
        "recipe": recipe,
        "again": again(results),
        "failures": [(failed_name(one, results), one.message) for one in results.failures],
        "flags": [(row, flag) for row in rows for flag in row.flags],
        "notes": [(row, note) for row in rows for note in row.notes],
        "fronts": front_rows(results),
        "distances": distance_rows(results),
        "certified": certified_rows(results),
        "corruptions": corruption_rows(results),
        "filters": filter_rows(results),
        "tolerance": tolerance_table(results),
        "sizes": cost_rows(results),
        "timings": timing_rows(results),
        "cost_notes": [(display_name(row, results), note) for row in rows for note in row.cost_notes],
        "sparse": [row for row in rows if row.sparsity > 0.001],
        "provenance": list(_flat(results.provenance)),
        "worst_class": worst_class,
    }


def again(results: Results) -> str:
    """Return the command that runs the recipe of the report again, with the overrides that it was read with."""
    given = results.provenance.get("overrides")
    overrides = [str(one) for one in given] if isinstance(given, list) else []
    return shlex.join(["robustkit", "run", "recipe.yaml", *overrides])


def worst_class(row: VariantResult) -> str:
    """Return the class with the lowest worst-case accuracy."""
    values = row.per_class.get("worst", {})
    if not values:
        return ""
    name = min(values, key=lambda key: values[key])
    return f"{name} {percent(values[name])}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}.")
        else:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            found.append((f"{prefix}{key}", text))
    return found


def _unique_ids(svg: str, prefix: str) -> str:
    """Ids must differ between the charts of one page."""
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href|href)="#', rf'\1="#{prefix}-', svg)
    return re.sub(r"url\(#", f"url(#{prefix}-", svg)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("robustkit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "rate": rate_text,
        "size": size_text,
        "count": count_text,
        "paired": paired_text,
        "gate": gate_text,
        "eps": eps_text,
        "front": lambda cost: COSTS.get(cost, cost),
    }
    environment.globals |= {"latency": latency_text, "display": display_name, "within_noise": within_noise}
    environment.globals |= {"beside": beside, "beside_head": beside_head}
    environment.globals |= {"certified_head": CERTIFIED_HEAD, "certified_note": CERTIFIED_NOTE}
    environment.globals |= {"corruptions_note": CORRUPTIONS_NOTE, "front_head": FRONT_HEAD, "front_note": FRONT_NOTE}
    environment.globals |= {"filter_head": FILTER_HEAD, "filter_note": FILTER_NOTE}
    environment.globals |= {"cost_head": COST_HEAD, "cost_note": COST_NOTE}
    environment.globals |= {"timing_head": TIMING_HEAD, "timing_note": TIMING_NOTE}
    environment.globals |= {"tolerance_note": TOLERANCE_NOTE}
    return environment


def to_html(values: Mapping[str, Any]) -> str:
    """Return the page: one file, nothing fetched, no script."""
    return _environment().get_template("report.html").render(**values)


def to_markdown(values: Mapping[str, Any]) -> str:
    """Return the same content in Markdown."""
    results: Results = values["results"]
    parts = [f"# {values['name']}", "", *values["verdict"], ""]
    if results.threat.get("quantize_input"):
        parts += ["Adversarial images were rounded to 8 bits before they were judged.", ""]
    if results.gates:
        cells = [[gate.text, gate.verdict, gate_text(gate)] for gate in results.gates]
        parts += ["## Gates", "", plain_rows(["gate", "verdict", "measured"], cells), ""]
    if values["failures"]:
        cells = [[name, message] for name, message in values["failures"]]
        parts += ["## Failed steps", "", plain_rows(["step", "why"], cells), ""]
    parts += ["## Variants", "", _summary(values), ""]
    if values["spreads"]:
        cells = [
            [
                one.name,
                str(one.seeds),
                percent(one.clean),
                percent(one.clean_spread),
                percent(one.worst),
                percent(one.worst_spread),
            ]
            for one in values["spreads"]
        ]
        head = ["variant", "seeds", "clean", "sd", "worst", "sd"]
        parts += ["## Over seeds", "", plain_rows(head, cells), ""]
    if values["fronts"]:
        parts += ["## Pareto fronts", "", FRONT_NOTE, "", plain_rows(FRONT_HEAD, values["fronts"]), ""]
    if values["distances"]:
        cells = [list(row) for row in values["distances"]]
        parts += ["## Minimal distances", "", plain_rows(DISTANCE_HEAD, cells), ""]
    parts += _sizes(values) + _certified(values) + _corruptions(values)
    if values["filters"]:
        parts += ["## Poisoning", "", FILTER_NOTE, "", plain_rows(list(FILTER_HEAD), values["filters"]), ""]
    if values["tolerance"]:
        head, *cells = values["tolerance"]
        parts += ["## Tolerated poisons", "", TOLERANCE_NOTE, "", plain_rows(head, cells), ""]
    parts += ["## Figures", "", *[f"![{CAPTIONS[name]}](figures/{name}.svg)\n" for name in values["figures"]]]
    if values["flags"]:
        cells = [[display_name(row, results), flag.severity, flag.id, flag.message] for row, flag in values["flags"]]
        parts += ["## Flags", "", plain_rows(["variant", "severity", "id", "message"], cells), ""]
    if values["notes"]:
        cells = [[display_name(row, results), note] for row, note in values["notes"]]
        parts += ["## Notes", "", plain_rows(["variant", "note"], cells), ""]
    parts += ["## Cost", "", _cost(values), ""]
    parts += ["## Provenance", "", plain_rows(["what", "value"], [list(pair) for pair in values["provenance"]]), ""]
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", values["recipe"])), default=0))
    parts += ["## Recipe", "", "Save it as recipe.yaml and run:", "", indent(values["again"], "    "), ""]
    parts += [f"{fence}yaml", values["recipe"].rstrip(), fence, ""]
    return "\n".join(parts)


def _summary(values: Mapping[str, Any]) -> str:
    results: Results = values["results"]
    extra = (values["proven"], bool(values["corrupted"]))
    head = [
        "variant",
        "method",
        "clean",
        *values["labels"],
        "worst",
        *beside_head(*extra),
        "vs parent",
        "p",
        "non-zero",
    ]
    head += ["bytes", "gzip"]
    head += ["MACs", "batch 1", "batch 256"]
    cells = []
    for row in values["rows"]:
        attacks = [rate_text(row.attacks[label]) if label in row.attacks else "" for label in values["labels"]]
        name = "&nbsp;&nbsp;" * row.depth + display_name(row, results)
        p = f"{row.versus_parent.p:.2g}" if row.versus_parent else ""
        sizes = [count_text(row.nonzero), size_text(row.bytes), size_text(row.gzip_bytes), count_text(row.macs)]
        latencies = [latency_text(row, "batch_1"), latency_text(row, "batch_256")]
        accuracies = [rate_text(row.clean), *attacks, f"**{rate_text(row.worst)}**", *beside(row, *extra)]
        cells.append([name, row.method, *accuracies, paired_text(row.versus_parent), p, *sizes, *latencies])
    return plain_rows(head, cells)


def _sizes(values: Mapping[str, Any]) -> list[str]:
    parts = ["## Size and speed", "", COST_NOTE, "", plain_rows(COST_HEAD, values["sizes"]), ""]
    if values["cost_notes"]:
        cells = [list(pair) for pair in values["cost_notes"]]
        parts += [plain_rows(["variant", "what compression brought"], cells), ""]
    if values["timings"]:
        parts += ["## Latency by runtime", "", TIMING_NOTE, "", plain_rows(TIMING_HEAD, values["timings"]), ""]
    return parts


def _certified(values: Mapping[str, Any]) -> list[str]:
    if not values["certified"]:
        return []
    return ["## Certified accuracy", "", CERTIFIED_NOTE, "", plain_rows(CERTIFIED_HEAD, values["certified"]), ""]


def _corruptions(values: Mapping[str, Any]) -> list[str]:
    if not values["corruptions"]:
        return []
    head = ["variant", "clean", "mean", *values["corrupted"]]
    return ["## Common corruptions", "", CORRUPTIONS_NOTE, "", plain_rows(head, values["corruptions"]), ""]


def _cost(values: Mapping[str, Any]) -> str:
    results: Results = values["results"]
    cells = [
        [
            display_name(row, results),
            count_text(row.forwards),
            count_text(row.backwards),
            f"{row.seconds:.1f}",
            f"{row.train_seconds:.1f}",
        ]
        for row in values["rows"]
    ]
    return plain_rows(["variant", "forwards", "backwards", "attack seconds", "training seconds"], cells)


__all__ = ["Picture", "context", "to_html", "to_markdown"]
