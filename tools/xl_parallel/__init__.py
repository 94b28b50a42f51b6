"""data: make parallel data: extract, align, mine, filter, score, split, code-switch, back-translate."""
