"""The training loop: steps, bad steps, checkpoints, stopping and the learning-rate schedule."""
