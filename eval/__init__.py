"""Evaluations: needles in haystacks, with their definitions, result files, tables and figures."""
