"""data: measure bias in a data set or in a model, every score with formula, n and interval."""
