"""Compact optimizers: state for the owned masked entries only. The maths are pure functions."""
