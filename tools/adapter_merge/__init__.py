"""train: merge an adapter into its base, or several into one, with the error shown."""
