"""train: distil a teacher into a smaller student, cut from it or given."""
