"""Rows of the report's tables, as text: the same in the terminal, in Markdown and in HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustkit import stats
from robustkit.results import GateResult, Latency, Paired, Rate, Results, StepFailure, VariantResult


def percent(value: float, digits: int = 1) -> str:
    """Return a fraction of 1 in percent, without the sign."""
    return f"{100 * value:.{digits}f}"


def half_width(rate: Rate) -> float:
    """Return the longer arm of an interval."""
    return max(rate.high - rate.value, rate.value - rate.low)


def rate_text(rate: Rate) -> str:
    """Return `43.0 ±3.1`, in percent."""
    return f"{percent(rate.value)} ±{percent(half_width(rate))}"


def size_text(count: float) -> str:
    """Return bytes as `1.2 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def count_text(count: float) -> str:
    """Return a number as `1.2 M`."""
    for unit in ("", "k", "M", "G"):
        if abs(count) < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} T"


def paired_text(paired: Paired | None) -> str:
    """Return `+43.0 [39.9, 46.1]`, or with `within noise` where the interval holds zero."""
    if paired is None:
        return ""
    text = f"{100 * paired.difference:+.1f} [{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]"
    return f"{text} within noise" if within_noise(paired) else text


def within_noise(paired: Paired) -> bool:
    """Say whether a difference may be chance: its interval holds zero, or the exact test says p >= 0.05."""
    return paired.low <= 0 <= paired.high or paired.p >= 0.05


def latency_text(row: VariantResult, batch: str) -> str:
    """Return the median latency with its quartiles, in milliseconds."""
    value: Latency | None = row.latency.get(batch)
    if value is None:
        return ""
    return f"{ms_text(value.median)} ms ({ms_text(value.q1)}-{ms_text(value.q3)})"


def ms_text(value: float) -> str:
    """Return milliseconds in three digits, from a second on in whole ones."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def attack_labels(results: Results) -> list[str]:
    """Return the attacks of a run in the order of the recipe."""
    return list(dict.fromkeys(label for row in results.variants for label in row.attacks))


def certificate_labels(results: Results) -> list[str]:
    """Return the certificates of a run in the order of the recipe."""
    return list(dict.fromkeys(label for row in results.variants for label in row.certified))


def corruption_names(results: Results) -> list[str]:
    """Return the corruptions that a run measured."""
    found = [row.corruptions.by for row in results.variants if row.corruptions]
    return list(dict.fromkeys(name for by in found for name in by))


def beside(row: VariantResult, labels: Sequence[str], corrupted: bool) -> list[str]:
    """Return what stands beside the worst case: certified accuracies, and the mean over corruptions where measured."""
    cells = [rate_text(row.certified[label]) if label in row.certified else "" for label in labels]
    return cells + ([rate_text(row.corruptions.mean) if row.corruptions else ""] if corrupted else [])


def beside_head(labels: Sequence[str], corrupted: bool) -> list[str]:
    """Return the heads of the columns that `beside` fills."""
    return [f"certified ({label})" for label in labels] + (["corrupted"] if corrupted else [])


def certified_rows(results: Results) -> list[list[str]]:
    """Return a row for each variant and certificate: what is certified, of which classifier, with how many doubts."""
    return [
        [
            display_name(row, results),
            label,
            "the smoothed classifier" if rate.smoothed else "the model",
            rate_text(rate),
            rate_text(row.worst),
            rate_text(rate.clean) if rate.clean else "",
            f"{rate.radius:.3g}",
            str(rate.abstained),
        ]
        for row in tree_order(results)
        for label, rate in row.certified.items()
    ]


CERTIFIED_HEAD = ("variant", "certificate", "of", "certified", "worst case", "its clean", "median radius", "abstained")


def corruption_rows(results: Results) -> list[list[str]]:
    """Return a row for each variant: its mean over corruptions, and over the severities of each."""
    names = corruption_names(results)
    rows = []
    for row in tree_order(results):
        if row.corruptions:
            by = row.corruptions.by
            means = [percent(sum(by[name]) / len(by[name])) if by.get(name) else "" for name in names]
            rows.append([display_name(row, results), percent(row.clean.value), rate_text(row.corruptions.mean), *means])
    return rows


def multiple_seeds(results: Results) -> bool:
    """Say whether variants were run under more than one seed."""
    return len({row.seed for row in results.variants}) > 1


def display_name(row: VariantResult, results: Results) -> str:
    """Return the variant's name, with its seed where there are several."""
    return f"{row.name} (seed {row.seed})" if multiple_seeds(results) else row.name


def failed_name(failure: StepFailure, results: Results) -> str:
    """Return which step failed: `robust (attack pgd)`, with its seed where there are several."""
    seeds = {row.seed for row in results.variants} | {one.seed for one in results.failures}
    seed = f", seed {failure.seed}" if len(seeds) > 1 else ""
    return f"{failure.variant or 'all variants'} ({failure.step}{seed})"


def tree_order(results: Results) -> list[VariantResult]:
    """Return the rows with each child after its parent, seed after seed; rows that start from each other come last."""
    present = {(row.name, row.seed) for row in results.variants}
    children: dict[tuple[str, int], list[int]] = {}
    roots = []
    for number, row in enumerate(results.variants):
        if row.parent is not None and (row.parent, row.seed) in present:
            children.setdefault((row.parent, row.seed), []).append(number)
        else:
            roots.append(number)
    ordered: dict[int, VariantResult] = {}
    waiting = [*reversed(range(len(results.variants))), *reversed(roots)]
    while waiting:
        number = waiting.pop()
        if number not in ordered:
            row = ordered[number] = results.variants[number]
            waiting += reversed(children.get((row.name, row.seed), []))
    return list(ordered.values())


@dataclass(frozen=True)
class Spread:
    """One variant over its seeds: mean, lowest and highest of clean and worst-case accuracy."""

    name: str
    seeds: int
    clean: float
    clean_spread: float
    worst: float
    worst_spread: float


def spreads(results: Results) -> list[Spread]:
    """Return one row a variant over its seeds; empty with a single seed."""
    if not multiple_seeds(results):
        return []
    found = []
    for name in dict.fromkeys(row.name for row in results.variants):
        rows = [row for row in results.variants if row.name == name]
        clean, clean_spread = stats.mean_and_spread([row.clean.value for row in rows])
        worst, worst_spread = stats.mean_and_spread([row.worst.value for row in rows])
        found.append(Spread(name, len(rows), clean, clean_spread, worst, worst_spread))
    return found


def distance_rows(results: Results) -> list[tuple[str, str, str, str, str]]:
    """Return variant, attack, norm, median distance and share found of each minimum-norm attack."""
    return [
        (
            display_name(row, results),
            label,
            found.norm,
            "not reached" if found.median is None else f"{found.median:.4g}",
            f"{percent(found.found)} %",
        )
        for row in tree_order(results)
        for label, found in row.distances.items()
    ]


def eps_text(threat: Mapping[str, Any]) -> str:
    """Return a threat as `linf, eps 0.1 of [0, 1]`."""
    unit = "changed values" if threat["norm"] == "l0" else "of [0, 1]"
    return f"{threat['norm']}, eps {threat['eps']:.4g} {unit}"


def gate_text(gate: GateResult) -> str:
    """Return the two sides of a gate as measured."""
    if gate.left < 0 and gate.right < 0:
        return "not measured"
    return f"{gate.left:.4g} against {gate.right:.4g}"


def to_csv(results: Results) -> str:
    """Return one line a variant and seed, accuracies as fractions of 1."""
    labels = attack_labels(results)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head = ["name", "seed", "parent", "method", "clean", "clean_low", "clean_high", "worst", "worst_low", "worst_high"]
    head += [f"attack:{label}" for label in labels]
    measured = list(dict.fromkeys(label for row in results.variants for label in row.distances))
    head += [f"median_distance:{label}" for label in measured]
    proven = certificate_labels(results)
    head += [*(f"certified:{label}" for label in proven), *(["corrupted"] if corruption_names(results) else [])]
    poisoned = any(row.poisoning for row in results.variants)
    head += ["success"] if poisoned else []
    head += [
        "n",
        "parameters",
        "nonzero",
        "sparsity",
        "bytes",
        "gzip_bytes",
        "macs",
        "activation_bytes",
        "latency_batch_1_ms",
    ]
    head += ["latency_batch_256_ms", "forwards", "backwards", "seconds", "train_seconds", "flags"]
    writer.writerow(head)
    for row in results.variants:
        attacks = [row.attacks[label].value if label in row.attacks else "" for label in labels]
        found = [row.distances[label].median if label in row.distances else None for label in measured]
        writer.writerow(
            [
                *map(plain_cell, [row.name, row.seed, row.parent or "", row.method]),
                *[row.clean.value, row.clean.low, row.clean.high, row.worst.value, row.worst.low, row.worst.high],
                *attacks,
                *["" if median is None else median for median in found],
                *[row.certified[label].value if label in row.certified else "" for label in proven],
                *([row.corruptions.mean.value if row.corruptions else ""] if corruption_names(results) else []),
                *([row.poisoning.success.value if row.poisoning else ""] if poisoned else []),
                *[row.clean.n, row.parameters, row.nonzero, row.sparsity, row.bytes, row.gzip_bytes, row.macs],
                "" if row.activation_bytes is None else row.activation_bytes,
                *[row.latency_ms.get("batch_1", ""), row.latency_ms.get("batch_256", "")],
                *[row.forwards, row.backwards, row.seconds, row.train_seconds],
                " ".join(f"{flag.severity}:{flag.id}" for flag in row.flags),
            ]
        )
    return buffer.getvalue()


def plain_cell(value: object) -> object:
    """Keep spreadsheets from taking a text for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def plain_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines)
