"""The report: every policy compared in one table, and one self-contained page that shows it."""
