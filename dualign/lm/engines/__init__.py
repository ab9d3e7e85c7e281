"""Sampling engines: prompts' token ids in, drawn answers' token ids out, by one interface."""
