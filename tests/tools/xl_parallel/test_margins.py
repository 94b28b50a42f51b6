"""Margins, retrieval and the BUCC threshold against brute force; piles with faults."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support import invoke, load_tool

pytest.importorskip("scipy")
pytest.importorskip("faiss")

from tuneutils.tools.xl_parallel.margins import MARGINS, Neighbours, measure, nearest, retrieve, tune
from tuneutils.tools.xl_parallel.score import pair_scores

XL = load_tool("xl-parallel")
EN = (
    "the red house is on the hill", "a black dog sleeps in the garden", "three birds sing every morning",
    "the old bridge crosses the river", "my sister reads a long book", "they sell fresh bread in the market",
    "the train leaves at seven", "snow fell during the whole night", "he forgot his keys at home",
    "we drink coffee without sugar",
)  # fmt: skip
ES = (
    "la casa roja está en la colina", "un perro negro duerme en el jardín", "tres pájaros cantan cada mañana",
    "el viejo puente cruza el río", "mi hermana lee un libro largo", "venden pan fresco en el mercado",
    "el tren sale a las siete", "cayó nieve durante toda la noche", "olvidó sus llaves en casa",
    "bebemos café sin azúcar",
)  # fmt: skip


def unit(rows: int, seed: int, dim: int = 12) -> np.ndarray:
    made = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def brute_margin(x: np.ndarray, y: np.ndarray, i: int, j: int, k: int, kind: str) -> float:
    """Artetxe and Schwenk 2019, equations 1 to 4, as they stand."""
    cosine = float(x[i] @ y[j])
    of_x = sorted((float(x[i] @ row) for row in y), reverse=True)[:k]
    of_y = sorted((float(y[j] @ row) for row in x), reverse=True)[:k]
    mean = sum(of_x) / (2 * len(of_x)) + sum(of_y) / (2 * len(of_y))
    return {"absolute": cosine, "distance": cosine - mean, "ratio": cosine / mean}[kind]


@pytest.mark.parametrize("kind", MARGINS)
@pytest.mark.parametrize("retrieval", ["forward", "backward", "intersection", "max"])
def test_retrieval_is_that_of_brute_force(kind: str, retrieval: str) -> None:
    x, y, k = unit(15, 0), unit(11, 1), 3
    found = retrieve(nearest(x, y, k, "exact"), nearest(y, x, k, "exact"), kind, retrieval)
    near = {
        "forward": {(i, j) for i in range(15) for j in np.argsort(-(y @ x[i]))[:k].tolist()},
        "backward": {(i, j) for j in range(11) for i in np.argsort(-(x @ y[j]))[:k].tolist()},
    }
    scores = {pair: brute_margin(x, y, *pair, k, kind) for pair in near["forward"] | near["backward"]}

    def best(direction: str, side: int) -> set[tuple[int, int]]:
        groups: dict[int, list[tuple[int, int]]] = {}
        for pair in near[direction]:
            groups.setdefault(pair[side], []).append(pair)
        return {max(some, key=lambda p: scores[p]) for some in groups.values()}

    forward, backward = best("forward", 0), best("backward", 1)
    if retrieval == "max":
        expected, used_i, used_j = set(), set(), set()
        for i, j in sorted(forward | backward, key=lambda p: -scores[p]):
            if i not in used_i and j not in used_j:
                expected.add((i, j))
                used_i.add(i)
                used_j.add(j)
    else:
        expected = {"forward": forward, "backward": backward, "intersection": forward & backward}[retrieval]
    got = list(zip(found.src.tolist(), found.tgt.tolist()))
    assert set(got) == expected
    assert len(got) == len(expected)
    assert found.scores == pytest.approx([scores[p] for p in got], abs=1e-5)
    assert (np.diff(found.scores) <= 0).all()


def test_k_beyond_the_pile_takes_all_of_it() -> None:
    near = nearest(unit(3, 0), unit(2, 1), 50, "exact")
    assert near.indices.shape == (3, 2)
    assert near.mean == pytest.approx((unit(3, 0) @ unit(2, 1).T).mean(1), abs=1e-6)


def test_approximate_search_finds_most_neighbours_and_never_fewer_than_k() -> None:
    x, y = unit(60, 2), unit(4000, 3)
    exact, approximate = nearest(x, y, 4, "exact"), nearest(x, y, 4, "approximate")
    shared = [len(set(a) & set(b)) for a, b in zip(exact.indices.tolist(), approximate.indices.tolist())]
    assert np.mean(shared) > 2
    assert (approximate.indices >= 0).all()
    assert (nearest(x, y[:3], 4, "approximate").indices >= 0).all()


def test_ratio_to_no_similarity_is_zero() -> None:
    none = Neighbours(np.zeros((2, 2), np.float32), np.array([[0, 1], [1, 0]]))
    assert retrieve(none, none, "ratio", "max").scores.tolist() == [0, 0]


def brute_threshold(scores: list[float], correct: list[bool], gold: int) -> tuple[float, float]:
    """Best F1 over every cut between different scores, and the middle of the two scores around it."""
    best = (0.0, 0.0)
    levels = sorted(set(scores), reverse=True)
    for n, level in enumerate(levels):
        taken = [c for s, c in zip(scores, correct) if s >= level]
        precision, recall = sum(taken) / len(taken), sum(taken) / gold
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        following = levels[n + 1] if n + 1 < len(levels) else level
        if f1 > best[0] + 1e-12:
            best = (f1, (level + following) / 2)
    return best


@pytest.mark.parametrize("seed", range(8))
def test_threshold_is_the_best_of_all_cuts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = np.sort(rng.integers(0, 12, 30) / 4).astype(np.float32)[::-1]
    correct = rng.random(30) < 0.5
    f1, threshold = brute_threshold(scores.tolist(), correct.tolist(), 20)
    found = tune(scores, correct, 20)
    assert (found.f1, found.threshold) == pytest.approx((f1, threshold))
    assert measure(scores, correct, 20, found.threshold).f1 == pytest.approx(f1)


def test_threshold_when_every_pair_is_right_takes_them_all() -> None:
    scores = np.array([3, 2, 1], np.float32)
    found = tune(scores, np.ones(3, bool), 3)
    assert (found.f1, found.extracted, found.threshold) == (1, 3, 1)


def test_no_pair_and_none_right() -> None:
    assert tune(np.zeros(0, np.float32), np.zeros(0, bool), 3).f1 == 0
    assert tune(np.ones(2, np.float32), np.zeros(2, bool), 3).extracted == 0


def test_scores_of_pairs_are_brute_force_margins() -> None:
    x, y = np.abs(unit(9, 4)), np.abs(unit(9, 5))  # means well above 0
    for kind in MARGINS:
        expected = [brute_margin(x, y, i, i, 4, kind) for i in range(9)]
        assert pair_scores(x, y, kind, 4) == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder learnt from the sentences and from their words in other orders."""
    folder = tmp_path_factory.mktemp("xl")
    rng = np.random.default_rng(0)
    rows = []
    for en, es in zip(EN, ES):
        for _ in range(6):
            pair = (" ".join(rng.permutation(en.split())), " ".join(rng.permutation(es.split())))
            rows.append({"src": pair[0], "tgt": pair[1], "src_lang": "en", "tgt_lang": "es"})
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    assert invoke(XL, "encoder", "-q", "--dim", "16", "-o", folder / "encoder", pairs).code == 0
    return folder / "encoder"


def lines(path: Path, texts: tuple[str, ...]) -> Path:
    path.write_text("".join(f"{t}\n" for t in texts), encoding="utf-8")
    return path


def mine(encoder: Path, src: Path, tgt: Path, out: Path, *more: str | Path) -> object:
    common = ("--src-lang", "en", "--tgt-lang", "es", "--encoder", encoder, "-o", out)
    return invoke(XL, "mine", *common, *more, src, tgt)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def gold(path: Path, count: int = len(EN)) -> Path:
    records = ({"src": a, "tgt": b, "src_lang": "en", "tgt_lang": "es"} for a, b in zip(EN[:count], ES))
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def test_mines_shuffled_piles_with_a_threshold_tuned_on_others(encoder: Path, tmp_path: Path) -> None:
    src, tgt = lines(tmp_path / "en", EN), lines(tmp_path / "es", ES[::-1])
    tuned, out = tmp_path / "tuned.jsonl", tmp_path / "out.jsonl"
    assert mine(encoder, src, tgt, tuned, "--tune", gold(tmp_path / "gold.jsonl")).code == 0
    done = mine(
        encoder, src, tgt, out, "--threshold", tuned, "--gold", tmp_path / "gold.jsonl", "--min-f1", "0.9"
    )
    assert done.code == 0, done.stderr
    found = {(r["src"], r["tgt"]) for r in rows(out)}
    assert len(found & set(zip(EN, ES))) >= 9
    assert all(
        EN[r["src_line"] - 1] == r["src"] and ES[::-1][r["tgt_line"] - 1] == r["tgt"] for r in rows(out)
    )
    assert (
        mine(
            encoder,
            src,
            tgt,
            out,
            "--gold",
            tmp_path / "gold.jsonl",
            "--min-f1",
            "1",
            "--threshold",
            "99",
            "--force",
        ).code
        == 1
    )


def test_repeated_blank_and_right_to_left_lines(encoder: Path, tmp_path: Path) -> None:
    src = lines(tmp_path / "en", (EN[0], "", EN[0], "  ", "שלום עולם ABC", EN[1]))
    tgt = lines(tmp_path / "es", (ES[1], ES[0], "مرحبا بالعالم"))
    assert mine(encoder, src, tgt, tmp_path / "out.jsonl", "--k", "100").code == 0
    manifest = json.loads((tmp_path / "out.jsonl.artifact.json").read_text())
    assert manifest["metrics"]["sentences"] == {"src": 3, "tgt": 3, "repeated": [1, 0]}
    best = {r["src"]: r["tgt"] for r in rows(tmp_path / "out.jsonl")[:2]}
    assert best == {EN[0]: ES[0], EN[1]: ES[1]}


def test_a_million_copies_are_one_sentence(encoder: Path, tmp_path: Path) -> None:
    src, tgt = tmp_path / "en", lines(tmp_path / "es", ES[:1])
    src.write_text(f"{EN[0]}\n" * 1_000_000, encoding="utf-8")
    assert mine(encoder, src, tgt, tmp_path / "out.jsonl").code == 0
    assert [r["src_line"] for r in rows(tmp_path / "out.jsonl")] == [1]


def test_swapped_piles_are_warned_of(encoder: Path, tmp_path: Path) -> None:
    src, tgt = lines(tmp_path / "a", ES), lines(tmp_path / "b", EN)
    assert "swapped piles" in mine(encoder, src, tgt, tmp_path / "out.jsonl").stderr
    assert "swapped piles" not in mine(encoder, tgt, src, tmp_path / "right.jsonl").stderr


def test_a_script_that_the_encoder_never_saw_is_warned_of(encoder: Path, tmp_path: Path) -> None:
    src, tgt = lines(tmp_path / "a", ("東京は大きい",)), lines(tmp_path / "b", ES)
    assert "nothing is known of 1 of 1" in mine(encoder, src, tgt, tmp_path / "out.jsonl").stderr


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--threshold", "x.jsonl"), 2, "x.jsonl.artifact.json"),
        (("--threshold", "1", "--tune", "GOLD"), 2, "use one"),
        (("--min-f1", "0.5"), 2, "--gold"),
        (("--encoder", "/nowhere/encoder"), 66, "no such folder"),
        (("--src-lang", "xx"), 65, "'xx'"),
    ],
)
def test_usage(encoder: Path, tmp_path: Path, more: tuple[str, ...], code: int, said: str) -> None:
    src, tgt = lines(tmp_path / "en", EN), lines(tmp_path / "es", ES)
    given = [str(gold(tmp_path / "gold.jsonl")) if m == "GOLD" else m for m in more]
    done = mine(encoder, src, tgt, tmp_path / "out.jsonl", *given)
    assert done.code == code
    assert said in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_an_empty_pile_is_named(encoder: Path, tmp_path: Path) -> None:
    src, tgt = lines(tmp_path / "en", ("", " ")), lines(tmp_path / "es", ES)
    done = mine(encoder, src, tgt, tmp_path / "out.jsonl")
    assert (done.code, "no sentences" in done.stderr) == (65, True)


def test_score_puts_translations_above_others(encoder: Path, tmp_path: Path) -> None:
    right = gold(tmp_path / "right.jsonl")
    wrong = [{"src": a, "tgt": b, "src_lang": "en", "tgt_lang": "es"} for a, b in zip(EN, ES[3:] + ES[:3])]
    both = tmp_path / "both.jsonl"
    both.write_text(right.read_text() + "".join(json.dumps(r) + "\n" for r in wrong), encoding="utf-8")
    for kind in MARGINS:
        out = tmp_path / f"{kind}.jsonl"
        assert invoke(XL, "score", "-q", "--margin", kind, "--encoder", encoder, "-o", out, both).code == 0
        scores = [r["score"] for r in rows(out)]
        assert np.mean([a > b for a, b in zip(scores[:10], scores[10:])]) >= 0.9
