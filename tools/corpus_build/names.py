"""Names of quality rules and kinds of question, for the command line; see ``rules.py`` and ``mine.py``."""

FAMILIES = ("gopher", "c4")
RULES = (
    "gopher-words",
    "gopher-word-length",
    "gopher-symbols",
    "gopher-bullets",
    "gopher-ellipsis",
    "gopher-alphabetic",
    "gopher-stop-words",
    "gopher-duplicate-lines",
    "gopher-duplicate-paragraphs",
    "c4-lorem-ipsum",
    "c4-curly-bracket",
    "c4-sentences",
    "gopher-top-ngrams",
    "gopher-duplicate-ngrams",
    "c4-terminal-punctuation",
    "c4-short-lines",
    "c4-javascript",
    "c4-policy",
    "c4-citations",
)
QUESTIONS = ("definition", "cause", "date", "condition", "section", "title", "summary", "continuation")
