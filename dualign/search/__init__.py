"""The outer loop of every method: its rules, and what they ask of models, data and people."""
