"""compress: remove weights, heads, channels or layers, with what each cost."""
