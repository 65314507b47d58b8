"""Training: objectives, the loop, checkpoints. `janusflow train CONFIG.yaml` is its door."""
