"""Laboratories that measure the methods; each is a command: `python -m bench.NAME`."""
