"""The trainer: flags, model loading, the loop, evaluation by generation."""
