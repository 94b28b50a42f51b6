"""train: continual pre-training on domain text, with replay, and with forgetting measured."""
