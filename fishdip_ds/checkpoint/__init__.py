"""State that survives: checkpoints for any number of ranks, and ordinary model folders."""
