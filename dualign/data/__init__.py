"""Data: one schema, readers for each source, and the embedded world."""
