"""What a person must see: the words that lean to a group, and the rows that lean most."""

from __future__ import annotations

import numpy as np

from tuneutils.tools.bias_scan.association import npmi
from tuneutils.tools.bias_scan.scores import Scores
from tuneutils.tools.bias_scan.tally import Sampled, Tally

SHOWN_CHARACTERS = 400
MIN_WORDS = 3
Table = dict[str, object]


def leaning_words(scores: Scores, count: int) -> list[Table]:
    """For each pair the words that lean most to either side, with their counts."""
    tables: list[Table] = []
    for name, pair in scores.pairs.items():
        if not len(pair.words):
            continue
        order = np.argsort(-pair.ratios, kind="stable")
        picked = order if len(order) <= 2 * count else np.concatenate([order[:count], order[-count:]])
        mutual = npmi(pair.near, pair.totals)
        first, second = name.split(".", 1)[1].split(":")
        rows = [
            [_word(scores, pair.words[i]), *map(float, (pair.ratios[i], *pair.near[:, i], *mutual[:, i]))]
            for i in picked.tolist()
        ]
        columns = ["word", "ln ratio", f"near {first}", f"near {second}", f"nPMI {first}", f"nPMI {second}"]
        tables.append({"title": f"{name}: words that lean", "columns": columns, "rows": rows})
    return tables


def frequent_terms(tally: Tally, count: int = 8) -> Table:
    """The terms by which each group was named most, so that false hits are seen."""
    by_group: dict[int, list[tuple[int, str]]] = {}
    groups = tally.matcher.term_group
    for term in np.flatnonzero(tally.terms).tolist():
        by_group.setdefault(int(groups[term]), []).append(
            (-int(tally.terms[term]), tally.matcher.terms[term])
        )
    rows = []
    for number in sorted(by_group):
        axis, group = tally.matcher.groups[number]
        most = ", ".join(f"{text} {-n}" for n, text in sorted(by_group[number])[:count])
        rows.append([tally.matcher.axes[axis], group, most])
    return {"title": "Most frequent terms of each group", "columns": ["axis", "group", "terms"], "rows": rows}


def worst_rows(scores: Scores, tally: Tally, count: int) -> list[Table]:
    """For each side of a pair the sampled rows whose words lean most to it, by their mean ln ratio."""
    made: list[Table] = []
    if not count:
        return made
    for name, pair in scores.pairs.items():
        axis, label = name.split(".", 1)
        for side, members, sign in zip(label.split(":"), (pair.first, pair.second), (1.0, -1.0)):
            leans = {scores.words[i]: sign * r for i, r in zip(pair.words.tolist(), pair.ratios.tolist())}
            found = _ranked(tally, members[0], leans)[:count] if len(members) == 1 else []
            if found:
                made.append({"title": f"{axis}, {side} ({name})", "rows": found})
    return made


def _ranked(tally: Tally, group: int, leans: dict[bytes, float]) -> list[dict[str, object]]:
    """The sampled rows of a group that lean to it by the mean log-ratio of their words; each text once."""
    rows = list({row.text: row for row in reversed(tally.sampled(group))}.values())
    mentions = tally.matcher.find([row.text for row in rows])
    words: dict[int, set[bytes]] = {}
    for at, token in zip(mentions.rows[mentions.row_of].tolist(), mentions.tokens):
        if token in leans:
            words.setdefault(at, set()).add(token)
    found: list[tuple[float, Sampled, str]] = []
    for at, tokens in words.items():
        lean = sum(leans[t] for t in sorted(tokens)) / len(tokens)
        if len(tokens) >= MIN_WORDS and lean > 0:
            most = sorted(tokens, key=lambda t: (-leans[t], t))[:3]
            note = ", ".join(f"{t.decode('utf-8', 'replace')} {leans[t]:+.2f}" for t in most)
            found.append((-lean, rows[at], f"mean ln ratio {lean:+.2f} of {len(tokens)} words; {note}"))
    return [
        {"place": f"{'<stdin>' if r.path == '-' else r.path}:{r.line}", "text": _short(r.text), "note": note}
        for _, r, note in sorted(found, key=lambda f: f[:2])
    ]


def _word(scores: Scores, number: int) -> str:
    return scores.words[number].decode("utf-8", "replace")


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …"
