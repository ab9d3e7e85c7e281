"""Judges of answers: scorers, refusals, and language models that are asked."""
