"""Readable dense single-process twins. Slow, memory-hungry, and what the sharded code must equal."""
