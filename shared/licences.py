"""What a package says of its licence, as an SPDX expression where that can be told, else in its own words."""

from __future__ import annotations

import json
import re
from email.parser import BytesHeaderParser
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuneutils.shared.registries import OpenArchive

UNKNOWN = "unknown"

_CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "MIT License": "MIT",
    "BSD License": "BSD",
    "GNU General Public License v3 (GPLv3)": "GPL-3.0-only",
    "GNU General Public License v2 (GPLv2)": "GPL-2.0-only",
    "GNU Lesser General Public License v3 (LGPLv3)": "LGPL-3.0-only",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "ISC License (ISCL)": "ISC",
}
_NAMES = {
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "mit license": "MIT",
    "apache": "Apache-2.0",
}
_TEXTS = (
    (r"Apache License\s+Version 2\.0", "Apache-2.0"),
    (r"Permission is hereby granted, free of charge", "MIT"),
    (r"Redistributions? of source code[\s\S]*Neither the name", "BSD-3-Clause"),
    (r"Redistributions? of source code", "BSD-2-Clause"),
    (r"Attribution-ShareAlike 4\.0", "CC-BY-SA-4.0"),
    (r"Attribution 4\.0 International", "CC-BY-4.0"),
    (r"GNU GENERAL PUBLIC LICENSE\s+Version 3", "GPL-3.0"),
    (r"GNU GENERAL PUBLIC LICENSE\s+Version 2", "GPL-2.0"),
    (r"Mozilla Public License Version 2\.0", "MPL-2.0"),
)


def from_archive(archive: OpenArchive) -> str:
    """The licence of a wheel (``METADATA``) or an sdist (``PKG-INFO``), or of the licence file it holds."""
    names = sorted(archive.names(), key=lambda n: (n.count("/"), n))
    for name in names:
        if name.endswith(".dist-info/METADATA") or name.rpartition("/")[2] == "PKG-INFO":
            found = from_metadata(BytesHeaderParser().parsebytes(archive.read(name)))
            if found != UNKNOWN:
                return found
            break
    return _from_licence_file(archive, names)


def from_metadata(metadata: Any) -> str:
    """License-Expression, then a short License, then the classifiers of core metadata."""
    expression = metadata.get("License-Expression")
    if expression:
        return str(expression)
    said = str(metadata.get("License") or "").strip()
    if said and said.upper() != "UNKNOWN" and len(said) <= 60 and "\n" not in said:
        return _NAMES.get(said.lower(), said)
    marks = [
        c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier") or () if c.startswith("License ::")
    ]
    named = [_CLASSIFIERS.get(m, m) for m in marks if m != "OSI Approved"]
    return " AND ".join(sorted(set(named))) or (of_text(said) if said else UNKNOWN)


def from_npm(archive: OpenArchive) -> str:
    """The ``license`` of ``package.json``."""
    names = sorted(archive.names(), key=lambda n: (n.count("/"), n))
    for name in names:
        if name.rpartition("/")[2] == "package.json":
            said = json.loads(archive.read(name)).get("license")
            if isinstance(said, dict):
                said = said.get("type")
            if isinstance(said, str) and said and not said.upper().startswith("SEE LICENSE"):
                return said
            break
    return _from_licence_file(archive, names)


def from_debian(archive: OpenArchive, package: str) -> str:
    """The licences that ``debian/copyright`` names (DEP-5), joined; of free text, the only one it quotes."""
    name = f"usr/share/doc/{package}/copyright"
    if name not in set(archive.names()):
        return UNKNOWN
    text = archive.read(name).decode("utf-8", errors="replace")
    if text.startswith("Format:"):
        named = re.findall(r"^License:[ \t]*(\S.*?)\s*$", text, flags=re.MULTILINE)
        return " AND ".join(dict.fromkeys(named)) or UNKNOWN
    return of_text(text) if sum(bool(re.search(p, text)) for p, _ in _TEXTS) == 1 else UNKNOWN


def from_hub_card(card: Any) -> str:
    """The ``license`` of a Hub card's metadata."""
    said = card.get("license") if card is not None else None
    if isinstance(said, list):
        said = " AND ".join(map(str, said))
    if said == "other" and card.get("license_name"):
        said = str(card.get("license_name"))
    return _spdx(str(said)) if said else UNKNOWN


def from_card_text(text: str) -> str:
    """The same from a README's YAML head."""
    head = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
    if head is None:
        return UNKNOWN
    import yaml

    try:
        card = yaml.safe_load(head.group(1))
    except yaml.YAMLError:
        return UNKNOWN
    return from_hub_card(card) if isinstance(card, dict) else UNKNOWN


def of_text(text: str) -> str:
    """The licence that a text is, by its telling sentence."""
    return next((name for pattern, name in _TEXTS if re.search(pattern, text)), UNKNOWN)


def _spdx(said: str) -> str:
    """The Hub writes SPDX identifiers in lower case."""
    known = {"apache-2.0": "Apache-2.0", "mit": "MIT", "cc0-1.0": "CC0-1.0", "gpl-3.0": "GPL-3.0"}
    if said.startswith("cc-by"):
        return said.upper()
    return known.get(said, said)


def _from_licence_file(archive: OpenArchive, names: list[str]) -> str:
    for name in names:
        if re.fullmatch(r"(LICEN[CS]E|COPYING)([.-].*)?", name.rpartition("/")[2], flags=re.IGNORECASE):
            return of_text(archive.read(name).decode("utf-8", errors="replace"))
    return UNKNOWN
