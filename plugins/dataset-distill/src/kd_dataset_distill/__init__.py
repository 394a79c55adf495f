"""Dataset distillation: matching gradients, distributions and trajectories, selection, and written data sets."""
