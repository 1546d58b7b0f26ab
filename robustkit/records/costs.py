"""What a model costs to keep and to ask."""

from __future__ import annotations

from robustkit.records.fields import Amount, Count, Name, Record


class Latency(Record):
    """Milliseconds a batch: median, quartiles and 95th percentile over `runs` interleaved runs."""

    median: Amount
    q1: Amount
    q3: Amount
    p95: Amount
    runs: Count


class Timing(Latency):
    """Latency of one batch size in one runtime with so many threads, beside that of the parent or the first variant."""

    runtime: Name
    """`eager`, `inductor` or `onnxruntime`."""
    threads: Count
    batch: Count
    versus: Name | None = None
    """The variant that it is compared with; none for the first."""
    ratio: Amount | None = None
    """That variant's median over this one's: 2 is twice as fast."""
    distinguishable: bool | None = None
    """Whether the two ranges from the first to the third quartile lie apart; else nothing is said by the ratio."""


class LayerSparsity(Record):
    """Zeros of one weight tensor."""

    name: Name
    size: Count
    zeros: Count
