"""Which weights to train and how: one method per file. ``registry`` names them without importing any."""
