"""Reward and cost models and their calibration."""
