"""Which language a text is in, and what languages are called in English."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

from tuneutils.shared.errors import require

#: ISO 639-1 code → English name, of languages with much text in public corpora.
NAMES = {
    "af": "Afrikaans", "am": "Amharic", "ar": "Arabic", "az": "Azerbaijani", "be": "Belarusian",
    "bg": "Bulgarian", "bn": "Bengali", "bs": "Bosnian", "ca": "Catalan", "cs": "Czech", "cy": "Welsh",
    "da": "Danish", "de": "German", "el": "Greek", "en": "English", "eo": "Esperanto", "es": "Spanish",
    "et": "Estonian", "eu": "Basque", "fa": "Persian", "fi": "Finnish", "fr": "French", "fy": "West Frisian",
    "ga": "Irish", "gd": "Scottish Gaelic", "gl": "Galician", "gu": "Gujarati", "ha": "Hausa",
    "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian", "hy": "Armenian",
    "id": "Indonesian", "ig": "Igbo", "is": "Icelandic", "it": "Italian", "ja": "Japanese",
    "jv": "Javanese", "ka": "Georgian", "kk": "Kazakh", "km": "Khmer", "kn": "Kannada", "ko": "Korean",
    "ky": "Kyrgyz", "la": "Latin", "lo": "Lao", "lt": "Lithuanian", "lv": "Latvian", "mg": "Malagasy",
    "mk": "Macedonian", "ml": "Malayalam", "mn": "Mongolian", "mr": "Marathi", "ms": "Malay",
    "mt": "Maltese", "my": "Burmese", "ne": "Nepali", "nl": "Dutch", "no": "Norwegian", "oc": "Occitan",
    "pa": "Punjabi", "pl": "Polish", "ps": "Pashto", "pt": "Portuguese", "ro": "Romanian",
    "ru": "Russian", "rw": "Kinyarwanda", "si": "Sinhala", "sk": "Slovak", "sl": "Slovenian",
    "so": "Somali", "sq": "Albanian", "sr": "Serbian", "su": "Sundanese", "sv": "Swedish",
    "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "tg": "Tajik", "th": "Thai", "tl": "Tagalog",
    "tr": "Turkish", "tt": "Tatar", "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese",
    "xh": "Xhosa", "yi": "Yiddish", "yo": "Yoruba", "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip


def name_of(code: str) -> str:
    """``sw`` → Swahili; a code without a name stays a code."""
    return NAMES.get(code.split("-")[0].lower(), code)


@cache
def _identifier(among: frozenset[str]) -> Any:
    require("py3langid", "languages")
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    made = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if known := among & set(made.labels):
        made.set_languages(known)
    return made


def detect(text: str, among: Collection[str] = ()) -> tuple[str | None, float]:
    """The likeliest language's ISO 639-1 code, and its probability among those that may be.

    py3langid's naive Bayes over byte n-grams (Lui and Baldwin 2012), whose model comes in the package; its
    probabilities are tempered by the text's length. Short texts are often told wrongly, less so when
    ``among`` names the few languages that may be.

    Args:
        among: codes; empty for all that it knows. Codes that it does not know never come out.

    Returns:
        None and 0 where the text has no letters.

    Raises:
        ToolError: py3langid is not installed (69).
    """
    if not any(character.isalpha() for character in text):
        return None, 0.0
    code, probability = _identifier(frozenset(among)).classify(text)
    return str(code), float(probability)


def knows(code: str) -> bool:
    """Whether ``detect`` can find this language."""
    return code in _identifier(frozenset()).labels
