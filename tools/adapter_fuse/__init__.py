"""train: learn how trained adapters act together; put a task adapter on a language adapter."""
