"""dualign: constrained alignment of language models."""
