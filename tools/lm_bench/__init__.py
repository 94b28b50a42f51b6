"""evaluate: measure quality, forgetting, speed, memory and size of any models side by side."""
