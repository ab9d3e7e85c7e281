"""Trackers of experiments, in a process of their own."""
