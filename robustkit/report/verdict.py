"""What the results say, in three sentences that are computed, never written."""

from __future__ import annotations

from robustkit.report.tables import display_name, failed_name, percent, size_text
from robustkit.results import Results, VariantResult

NAMED = 4
"""So many failed steps are named, the others counted."""


def verdict(results: Results) -> list[str]:
    """Return at most three sentences: the most robust variant, the best small one, and what is in doubt."""
    trusted = [row for row in results.variants if not any(flag.severity == "wrong" for flag in row.flags)]
    sentences = [_robust(trusted, results), _small(trusted, results), _doubts(results)]
    return [sentence for sentence in sentences if sentence]


def _robust(trusted: list[VariantResult], results: Results) -> str:
    if not trusted:
        return "No variant can be named: each carries a flag that says its figures are wrong."
    if not any(row.attacks for row in trusted):
        return "No attack was run, so nothing is known about robustness."
    best = max(trusted, key=lambda row: (row.worst.value, row.clean.value))
    name, low, high = display_name(best, results), percent(best.worst.low), percent(best.worst.high)
    text = f"{name} is the most robust: {percent(best.worst.value)} % worst case [{low}, {high}]"
    plain = max(trusted, key=lambda row: row.clean.value)
    if plain.name == best.name:
        return f"{text}, and it has the best clean accuracy too ({percent(best.clean.value)} %)."
    cost = 100 * (plain.clean.value - best.clean.value)
    return (
        f"{text}, at {percent(best.clean.value)} % clean; that is {cost:.1f} points below "
        f"{display_name(plain, results)}, which keeps {percent(plain.worst.value)} % under attack."
    )


def _small(trusted: list[VariantResult], results: Results) -> str:
    sizes = {(row.name, row.seed): row.bytes for row in results.variants}
    small = [row for row in trusted if not row.members]
    # A child may be trained further, or have grown: it is compressed where it is sparse or smaller than its parent.
    compressed = [row for row in small if row.sparsity > 0.01 or row.bytes < sizes.get((row.parent or "", row.seed), 0)]
    front = [row for row in compressed if row.pareto]
    if not compressed:
        return ""
    if not front:
        return "No compressed variant is on the Pareto front of worst-case accuracy and size."
    best = max(front, key=lambda row: (row.worst.value, -row.gzip_bytes))
    parent = next((row for row in results.variants if row.name == best.parent and row.seed == best.seed), None)
    text = (
        f"The best compressed variant on the Pareto front is {display_name(best, results)}: "
        f"{percent(best.worst.value)} % worst case in {size_text(best.gzip_bytes)} gzipped"
    )
    if parent is None or not parent.gzip_bytes:
        return f"{text}."
    if best.versus_parent is None:
        return f"{text}, {best.gzip_bytes / parent.gzip_bytes:.0%} of {parent.name}'s."
    change = 100 * (best.worst.value - parent.worst.value)
    return f"{text}, {best.gzip_bytes / parent.gzip_bytes:.0%} of {parent.name}'s, {change:+.1f} points of worst case."


def _doubts(results: Results) -> str:
    failed = [gate.text for gate in results.gates if not gate.holds]
    wrong = sorted({row.name for row in results.variants for flag in row.flags if flag.severity == "wrong"})
    doubt = sorted({row.name for row in results.variants for flag in row.flags if flag.severity == "doubt"})
    parts = []
    if results.failures:
        names = [failed_name(one, results) for one in results.failures]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        parts.append(f"steps that failed: {', '.join(names[:NAMED])}{more}")
    if failed:
        parts.append(f"gates that fail: {'; '.join(failed)}")
    if wrong:
        parts.append(f"figures not to be quoted: {', '.join(wrong)}")
    if doubt:
        parts.append(f"in doubt: {', '.join(doubt)}")
    if not parts:
        return "Every gate holds and no flag is raised." if results.gates else "No flag is raised."
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."
