"""Experiments made of many runs: comparing heads, with resumable units, tables and a report."""
