"""train: quantization-aware training, so that a model survives 4 or 8 bits."""
