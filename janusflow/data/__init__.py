"""Data for training and evaluation: the shapes world, and what turns samples into batches."""
