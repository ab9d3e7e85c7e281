"""Training with TRL: the one package that touches it."""
