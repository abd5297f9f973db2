"""Readers of dataset files, by name: from a folder to examples. ``registry.READERS`` lists them."""
