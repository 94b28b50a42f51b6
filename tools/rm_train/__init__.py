"""train: a Bradley–Terry reward model from preferences, and its scores."""
