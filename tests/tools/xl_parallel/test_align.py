"""Beads against brute force and published formulas; documents that are odd in every way."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

import numpy as np
import pytest
from support import invoke, load_tool

pytest.importorskip("scipy")

from tuneutils.tools.xl_parallel import band as bands
from tuneutils.tools.xl_parallel.beads import Bead, best_path, whole
from tuneutils.tools.xl_parallel.lengths import gale_church
from tuneutils.tools.xl_parallel.similarity import BlockCosts, View, kinds_up_to

TOOL = load_tool("xl-parallel")
EN = [
    "The house stands on the hill.", "Nobody lives there.", "In 1956 two climbers came: Smith and Keller.",
    "They stayed for 3 nights.", "Then it snowed.", "The valley was closed until April.",
]  # fmt: skip
ES = [
    "La casa está en la colina.", "Nadie vive allí.", "En 1956 llegaron dos escaladores: Smith y Keller.",
    "Se quedaron 3 noches.", "Luego nevó.", "El valle estuvo cerrado hasta abril.",
]  # fmt: skip
WORDS = """house casa
hill colina
nobody nadie
two dos
night noche
then luego
snow nieve
snow nevó
valley valle
closed cerrado
April abril
stayed quedaron
""".replace(" ", "\t")


def cheapest(n, m, kinds, cost, insertion):
    """All paths, by recursion."""
    memo = {(0, 0): (0.0, ())}

    def best(i, j):
        if (i, j) not in memo:
            options = []
            for k, (a, b) in enumerate(kinds):
                if a <= i and b <= j:
                    before, path = best(i - a, j - b)
                    options.append((before + cost[k, i, j], (*path, (i - a, i, j - b, j))))
            if j:
                before, path = best(i, j - 1)
                options.append((before + insertion[j - 1], (*path, (i, i, j - 1, j))))
            memo[i, j] = min(options) if options else (math.inf, ())
        return memo[i, j]

    return best(n, m)


@pytest.mark.parametrize(
    ("n", "m", "seed"), [(1, 1, 0), (1, 6, 1), (7, 1, 2), (6, 5, 3), (5, 8, 4), (9, 9, 5)]
)
def test_the_path_is_the_cheapest_of_all(n, m, seed):
    kinds = [(1, 0), (1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]
    rng = np.random.default_rng(seed)
    cost, insertion = rng.random((len(kinds), n + 1, m + 1)), rng.random(m)
    left, width = whole(n, m)
    found = best_path(n, m, kinds, lambda i, s, w: cost[:, i, s : s + w], insertion, left, width)
    assert [tuple(b) for b in found] == list(cheapest(n, m, kinds, cost, insertion)[1])


def test_a_band_that_holds_the_path_gives_the_same_path():
    kinds, n, m = [(1, 0), (1, 1), (1, 2), (2, 1)], 40, 44
    rng = np.random.default_rng(0)
    cost, insertion = 1 + rng.random((len(kinds), n + 1, m + 1)), 1 + rng.random(m)
    for i in range(1, n + 1):
        cost[1, i, i] = 0.01  # the diagonal, with what is left over inserted at the end

    def costs(row, start, width):
        out = np.full((len(kinds), width), np.nan)
        got = cost[:, row, start : start + width]
        out[:, : got.shape[1]] = got
        return out

    full = best_path(n, m, kinds, costs, insertion, *whole(n, m))
    left = np.maximum(np.arange(n + 1) - 6, 0)
    assert best_path(n, m, kinds, costs, insertion, left, 20) == full
    with pytest.raises(ValueError, match="band"):
        best_path(n, m, kinds, costs, insertion, np.zeros(n + 1, np.int64), 5)


def test_large_documents_are_searched_coarse_to_fine(monkeypatch):
    monkeypatch.setattr(bands, "CELLS", 100)
    monkeypatch.setattr(bands, "RADIUS", 10)
    n, m, asked = 200, 240, []

    def align(block, left, width):
        asked.append((block, len(left), width))
        rows, cols = -(-n // block), -(-m // block)
        return best_path(
            rows, cols, [(1, 0), (1, 1)],
            lambda i, s, w: np.stack([np.ones(w), np.abs(np.arange(s, s + w) / cols - i / rows)]),
            np.full(cols, 0.01), left, width,
        )  # fmt: skip

    left, width = bands.band(n, m, align)
    assert [block for block, _, _ in asked] == [64, 8]
    assert width < m / 2
    for i in range(n + 1):
        assert left[i] <= i * m / n < left[i] + width
    assert left[0] == 0
    assert left[n] + width >= m + 1


def test_gale_church_costs_are_the_papers():
    """Section 3: -ln of 2(1 - Φ(|δ|)) and of the prior; Φ by the standard library."""
    src, tgt = np.array([30.0, 55.0, 12.0]), np.array([33.0, 40.0, 20.0])
    kinds, costs, insertion = gale_church(src, tgt)
    priors = {(1, 1): 0.89, (1, 0): 0.0099, (2, 1): 0.089, (1, 2): 0.089, (2, 2): 0.011}
    row = costs(2, 0, 4)
    for k, (a, b) in enumerate(kinds):
        for j in range(b, 4):
            x, y = src[2 - a : 2].sum(), tgt[j - b : j].sum()
            delta = abs(y - x) / math.sqrt(6.8 * (x + y) / 2)
            wanted = -math.log(2 * (1 - statistics.NormalDist().cdf(delta))) - math.log(priors[a, b])
            assert row[k, j] == pytest.approx(wanted, rel=1e-6)
    delta = 33 / math.sqrt(6.8 * 33 / 2)
    assert insertion[0] == pytest.approx(
        -math.log(2 * (1 - statistics.NormalDist().cdf(delta))) - math.log(0.0099), rel=1e-6
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt(a @ a * (b @ b))) if a.any() and b.any() else 0.0


def test_costs_of_blocks_by_the_formula():
    """Summed vectors, cosines less what is usual, and lengths; across two chunks of rows, dense and sparse."""
    from scipy import sparse

    rng = np.random.default_rng(0)
    n, m = 70, 9
    dense, rare = ([rng.random((count, 5)) for count in (n, m)] for _ in range(2))
    for side in rare:
        side[rng.random(side.shape) < 0.6] = 0
    rare[1][3] = 0  # a sentence without a vector
    sizes = [rng.integers(5, 60, count).astype(float) for count in (n, m)]
    views = [
        View(dense[0].astype(np.float32), dense[1].astype(np.float32), 3),
        View(*(sparse.csr_matrix(side, dtype=np.float32) for side in rare), 1),
    ]
    kinds = kinds_up_to(6)
    costs = BlockCosts(views, *sizes, kinds, *whole(n, m))

    def similarity(a: slice, b: slice) -> float:
        def cosines(x: slice | int, y: slice | int) -> float:
            sides = ((left[x].reshape(-1, 5), right[y].reshape(-1, 5)) for left, right in (dense, rare))
            return sum(w * cosine(a.sum(0), b.sum(0)) for w, (a, b) in zip((0.75, 0.25), sides))

        of_all = [cosines(a, j) for j in range(m)], [cosines(i, b) for i in range(n)]
        usual = (statistics.fmean(of_all[0]) + statistics.fmean(of_all[1])) / 2
        return (cosines(a, b) - usual) / (1 - usual)

    for i, j in [(6, 7), (63, 5), (64, 8), (66, 6), (70, 9)]:
        row = costs(i, 0, m + 1)
        for k, (a, b) in enumerate(kinds):
            if not b:
                assert row[k, j] == pytest.approx(0.6)
                continue
            x, y = sizes[0][i - a : i].sum(), sizes[1][j - b : j].sum()
            delta = abs(y - x) / math.sqrt(6.8 * (x + y) / 2)
            far = -math.log(max(2 * statistics.NormalDist().cdf(-delta), math.exp(-20)))
            wanted = (1 - similarity(slice(i - a, i), slice(j - b, j))) * (a + b) / 2 + 0.035 * far
            wanted += 0.137 * (a + b - 2) + (0.02 if a + b > 2 else 0)
            assert row[k, j] == pytest.approx(wanted, abs=1e-3)
    beads = [Bead(3, 5, 2, 3), Bead(64, 65, 4, 4), Bead(68, 70, 6, 9)]
    expected = [similarity(slice(*b[:2]), slice(*b[2:])) for b in (beads[0], beads[2])]
    found = costs.scores(beads)
    assert found[1] is None
    assert found[::2] == pytest.approx([min(max(e, 0), 1) for e in expected], abs=1e-5)


def run(tmp_path: Path, src: list[str], tgt: list[str], *args: object, langs: tuple[str, str] = ("en", "es")):
    for name, lines in (("a", src), ("b", tgt)):
        (tmp_path / name).write_text("".join(line + "\n" for line in lines), "utf-8")
    out, ladder = tmp_path / "out.jsonl", tmp_path / "ladder"
    result = invoke(
        TOOL, "align", tmp_path / "a", tmp_path / "b", "--src-lang", langs[0], "--tgt-lang", langs[1],
        "--force", "-o", out, "--ladder", ladder, *args,
    )  # fmt: skip
    if result.code:
        return result, [], []
    records = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    beads = [tuple(json.loads(side) for side in line.split(":")) for line in ladder.read_text().splitlines()]
    return result, records, beads


def covered(beads: list, side: int) -> list[int]:
    return [i for bead in beads for i in bead[side]]


@pytest.fixture
def words(tmp_path):
    (tmp_path / "words.tsv").write_text(WORDS, "utf-8")
    return tmp_path / "words.tsv"


@pytest.mark.parametrize("method", ["gale-church", "dictionary"])
def test_translations_in_order_go_one_to_one(tmp_path, words, method):
    more = ("--dictionary", words) if method == "dictionary" else ()
    _, records, beads = run(tmp_path, EN, ES, "--method", method, *more)
    assert beads == [([i], [i]) for i in range(6)]
    assert [(r["src"], r["tgt"]) for r in records] == list(zip(EN, ES))
    assert all(r["src_lang"] == "en" and r["tgt_lang"] == "es" for r in records)


def test_sentences_split_and_left_out_are_found(tmp_path, words):
    src = [*EN[:2], EN[2] + " " + EN[3], *EN[4:]]
    tgt = ["Prólogo del editor sobre otra cosa muy distinta.", *ES]
    _, _, beads = run(tmp_path, src, tgt, "--dictionary", words)
    assert ([2], [3, 4]) in beads
    assert ([], [0]) in beads
    assert covered(beads, 0) == list(range(5))
    assert covered(beads, 1) == list(range(7))


def test_a_bead_of_ten_sentences_is_written(tmp_path):
    words = [f"{a}{b}{c}" for a in ("bar", "dol", "kim", "zep") for b in "aeiou" for c in ("th", "nx")]
    parts = [" ".join(words[i : i + 4]) for i in range(0, 40, 4)]
    _, records, beads = run(tmp_path, [" ".join(words)], parts, "--max-size", "12")
    assert beads == [([0], list(range(10)))]
    assert [r["tgt_lines"] for r in records] == [list(range(1, 11))]


def test_blank_lines_are_skipped_and_keep_their_numbers(tmp_path, words):
    src = [EN[0], "", "  ", *EN[1:]]
    _, records, _ = run(tmp_path, src, ES, "--dictionary", words)
    assert [r["src_lines"] for r in records] == [[1], [4], [5], [6], [7], [8]]
    assert [r["tgt_lines"] for r in records] == [[i] for i in range(1, 7)]


def test_a_side_cut_short_leaves_the_rest_out(tmp_path, words):
    _, _, beads = run(tmp_path, EN, ES[:4], "--dictionary", words)
    assert beads[:3] == [([i], [i]) for i in range(3)]
    assert beads[-1] == ([5], [])
    assert covered(beads, 0) == list(range(6))


def test_the_same_text_on_both_sides_is_said(tmp_path):
    result, records, beads = run(tmp_path, EN, EN)
    assert beads == [([i], [i]) for i in range(6)]
    assert "same language" in result.stderr
    assert all(r["score"] > 0.9 for r in records)


@pytest.mark.parametrize("method", ["gale-church", "dictionary"])
def test_identical_sentences_and_other_scripts_are_covered_whole(tmp_path, method):
    cases = [
        (["same line"] * 30, ["misma línea"] * 27),
        (["مرحبا بالعالم 42", "كيف حالك؟ OK"], ["שלום עולם 42", "מה שלומך? OK", "日本語とEnglish混在"]),
        (["x"], ["y " * 2000, "z"]),
        (["x"], ["y " * 2000]),
        (["= = ="] * 9, ["= = ="] * 7),
    ]
    for src, tgt in cases:
        _, _, beads = run(tmp_path, src, tgt, "--method", method, langs=("ar", "he"))
        assert covered(beads, 0) == list(range(len(src)))
        assert covered(beads, 1) == list(range(len(tgt)))


def test_an_encoder_learnt_from_pairs_aligns_and_is_the_same_each_time(tmp_path):
    rng = random.Random(0)
    left = [f"{a}{b}" for a in ("ba", "do", "ki", "mu", "zo") for b in ("ran", "tel", "pim", "sog", "wuv")]
    right = {w: "".join(reversed(w)).replace("a", "ï") for w in left}
    sentences = [[rng.choice(left) for _ in range(rng.randint(4, 9))] for _ in range(460)]
    pairs = [(" ".join(s), " ".join(right[w] for w in s)) for s in sentences]
    train = tmp_path / "train.jsonl"
    train.write_text(
        "".join(
            json.dumps({"src": a, "tgt": b, "src_lang": "xx", "tgt_lang": "yy"}) + "\n"
            for a, b in pairs[:400]
        ),
        "utf-8",
    )
    folders = [tmp_path / "enc1", tmp_path / "enc2"]
    for folder in folders:
        made = invoke(TOOL, "encoder", train, "-o", folder, "--dim", "20", "--features", "500")
        assert made.code == 0, made.stderr
    for name in ("encoder.json", "encoder.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    src, tgt = [a for a, _ in pairs[400:]], [b for _, b in pairs[400:]]
    for drop in (50, 30, 10):
        del tgt[drop]
    result, _, beads = run(tmp_path, src, tgt, "--encoder", folders[0], langs=("xx", "yy"))
    assert result.code == 0, result.stderr
    wanted = [i for i in range(60) if i not in (10, 30, 50)]
    assert sum((([i], [j]) in beads) for j, i in enumerate(wanted)) >= 52
    swapped, _, _ = run(tmp_path, tgt, src, "--encoder", folders[0], langs=("yy", "xx"))
    assert swapped.code == 0
    unknown, _, _ = run(tmp_path, src, tgt, "--encoder", folders[0], langs=("xx", "tlh"))
    assert unknown.code == 65
    assert "xx, yy" in unknown.error
    assert "'tlh'" in unknown.error


def test_what_cannot_be_aligned_is_one_line(tmp_path):
    result, _, _ = run(tmp_path, ["", " "], ES)
    assert result.code == 65
    assert "no sentences" in result.error
    result, _, _ = run(tmp_path, EN, ES, "--method", "embedding")
    assert result.code == 2
    result, _, _ = run(tmp_path, EN, ES, "--method", "gale-church", "--min-score", "0.1")
    assert (result.code, "--min-score" in result.error) == (2, True)
    (tmp_path / "bad.tsv").write_text("house casa\n")
    result, _, _ = run(tmp_path, EN, ES, "--dictionary", tmp_path / "bad.tsv")
    assert result.code == 65
    assert "bad.tsv:1" in result.error
    (tmp_path / "latin1").write_bytes("montaña\n".encode("latin-1"))
    result = invoke(
        TOOL, "align", tmp_path / "latin1", tmp_path / "a", "--src-lang", "es", "--tgt-lang", "en"
    )
    assert result.code == 65
    assert "not UTF-8" in result.error
    result = invoke(TOOL, "align", tmp_path / "a", "--src-lang", "es", "--tgt-lang", "en")
    assert result.code == 2
