"""Answers of a policy, scored, and statistics of what was measured."""
