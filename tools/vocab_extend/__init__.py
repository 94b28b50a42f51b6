"""train: give a model the tokens of a new language, with embeddings to start from."""
