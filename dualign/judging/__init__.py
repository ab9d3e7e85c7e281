"""Judges of answers: the run's scorers, an independent pair, refusals, and language models that are asked."""
