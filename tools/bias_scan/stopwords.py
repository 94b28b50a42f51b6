"""Function words, which tell nothing of a group and are passed over in a mention's surroundings."""

from __future__ import annotations

import json
from pathlib import Path


def stop_words(language: str) -> frozenset[str]:
    """English ones are listed here, others are those of stopwords-iso (MIT)."""
    if language == "en":
        return STOP_WORDS
    place = Path(__file__).parent / "data" / "stopwords.json"
    return frozenset(json.loads(place.read_text(encoding="utf-8"))[language].split())


STOP_WORDS = frozenset(
    """
    a about above across after again against all almost alone along already also although always am among an
    and another any anybody anyone anything anywhere are aren around as at away back be became because become
    becomes been before behind being below between both but by came can cannot could couldn d did didn do does
    doesn doing don done down during each either else enough especially even ever every everybody everyone
    everything everywhere few for from further get gets getting give given gives go goes going gone got had
    hadn has hasn have haven having here how however i if in indeed instead into is isn it its itself just
    keep kept know known last least less let like likely ll m made make makes making many may maybe me might
    mine more most mostly much must my myself near need needed needs neither never next no nobody none nor not
    nothing now nowhere o of off often on once one ones only onto or other others otherwise ought our ours
    ourselves out over own per perhaps put quite rather re really s said same say says see seem seemed seems
    seen several shall should shouldn since so some somebody someone something sometimes somewhere soon still
    such t take taken takes than that the their theirs them themselves then there therefore these they thing
    things this those though through thus to together too toward towards took two under until up upon us use
    used uses using usually ve very via want wants was wasn way we well went were weren what whatever when
    where wherever whether which while who whoever whole whom whose why will with within without won would
    wouldn y yet you your yours yourself yourselves
    """.split()  # noqa: SIM905
)
