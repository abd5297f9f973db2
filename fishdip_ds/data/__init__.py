"""Readers, low-resource sampling, tokenised datasets, the step loader and the generated demo corpus."""
