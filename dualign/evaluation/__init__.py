"""Answers of a policy, scored, statistics of what was measured, and in the world the truth."""
