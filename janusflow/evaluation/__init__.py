"""Judging pictures and answers: the exact scorer of the shapes world and its benchmarks."""
