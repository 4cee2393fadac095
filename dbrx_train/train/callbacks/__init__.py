"""What happens around a training step: learning rate, clipping, expert load, progress, checkpoints."""
