"""train: align a model with a reward by PPO: learned, programmed or served."""
