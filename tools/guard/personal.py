"""Personal data by patterns with checksums, and by Presidio where it is asked for."""

from __future__ import annotations

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
    require("en_core_web_sm", "presidio")
    from presidio_analyzer import AnalyzerEngine
    from presidio_analyzer.nlp_engine import NlpEngineProvider

    models = [{"lang_code": "en", "model_name": "en_core_web_sm"}]
    try:
        engine = NlpEngineProvider(nlp_configuration={"nlp_engine_name": "spacy", "models": models})
        return AnalyzerEngine(nlp_engine=engine.create_engine(), supported_languages=["en"])
    except (OSError, ValueError, SystemExit) as exc:
        raise ToolError(f"--presidio: cannot start: {exc}", code=ExitCode.UNAVAILABLE) from exc
