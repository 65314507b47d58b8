"""The model: language model, understanding path, generation heads, and their checkpoints."""
