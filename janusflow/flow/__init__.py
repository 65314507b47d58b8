"""Rectified flow: path, grids, solvers, guidance. Knows torch and nothing of language models."""
