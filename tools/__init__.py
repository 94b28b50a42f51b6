"""The tuneutils commands, one folder each."""
