"""Sequence labeling as text-to-text: one small file per task over shared writing, parsing and alignment."""
