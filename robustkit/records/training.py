"""How a training went."""

from __future__ import annotations

from robustkit.records.fields import Amount, Count, Difference, Loss, Measured, Record, Share


class EpochRow(Record):
    """One epoch of training, as in epochs.jsonl. Accuracies are fractions of 1."""

    epoch: Count
    loss: Measured
    train_accuracy: Share
    validation_loss: Loss | None = None
    """Cross-entropy on the validation split; `clean` and `robust` are accuracies on it."""
    clean: Share
    robust: Share | None = None
    test_loss: Loss | None = None
    """With `train.monitor_test`: loss and accuracy on the test split, which nothing is chosen by."""
    test_accuracy: Share | None = None
    single_step: Share | None = None
    """Accuracy on the validation split under one step, beside `robust` under many: a gap is a collapse."""
    margin: Difference | None = None
    """Mean margin beside `robust`: the best wrong class's probability minus the right one's; lower is better."""
    lr: float | None = None
    """Learning rate of the first parameter group at the epoch's end."""
    seconds: Amount = 0.0
