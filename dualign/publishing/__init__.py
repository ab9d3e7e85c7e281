"""Policies as they leave: a model card in the hub's form, and the way there."""
