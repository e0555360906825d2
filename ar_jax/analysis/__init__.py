"""Analysis: what models cost, and what they do."""
