"""What to train: masks, exact distributed top-k, per-sample losses. Knows tensors and ranks, not DeepSpeed."""
