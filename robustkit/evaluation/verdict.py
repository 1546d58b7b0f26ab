"""What an evaluation says of a model, in a sentence that is computed, never written."""

from __future__ import annotations

from robustkit.evaluation.evaluation import Evaluation


def verdict_of(found: Evaluation) -> str:
    """Return the share that is right under every attack, beside the clean one, and whether it can be believed."""
    worst, clean = found.worst, found.clean
    eps = "one eps an example" if not isinstance(found.threat.eps, float | int) else f"eps {found.threat.eps:.4g}"
    text = (
        f"under {found.threat.norm} {eps} at most {worst.value:.1%} of {worst.n} examples stay right "
        f"[{worst.low:.1%}, {worst.high:.1%}], {clean.value:.1%} do without an attack"
    )
    for severity, says in (("wrong", "Not to be quoted"), ("doubt", "In doubt")):
        ids = sorted({flag.id for flag in found.flags if flag.severity == severity})
        if ids:
            return f"{says} ({', '.join(ids)}): {text}"
    return f"{text[0].upper()}{text[1:]}; no flag puts that in doubt"
