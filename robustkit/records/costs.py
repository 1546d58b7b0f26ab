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


class LayerSparsity(Record):
    """Zeros of one weight tensor."""

    name: Name
    size: Count
    zeros: Count
