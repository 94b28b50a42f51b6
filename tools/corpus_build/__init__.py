"""data: raw files into a clean domain corpus, with questions and a benchmark made from it."""
