"""Which examples to label next: a pool, query strategies, rounds from the base model, and what to measure."""
