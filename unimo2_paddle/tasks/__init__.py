"""One file per learning problem: batch to loss, batch to predictions, metric."""
