"""Fairness of predictions and consistency over twins: Fairlearn's values, and counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Result, write_jsonl

from tuneutils.shared.errors import ToolError
from tuneutils.tools.bias_scan.models import consistency, fairness
from tuneutils.tools.bias_scan.models.predictors import choose

from .conftest import build_classifier, scorer

Cli = Callable[..., Result]
Y, P, G = "11001010", "10011000", "aaaabbbb"


def values(groups: Any, predictions: Any, labels: Any) -> dict[tuple[str, str], float | None]:
    return {(m.metric, m.group): m.value for m in fairness.measures(groups, predictions, labels)}


def bits(text: str) -> list[bool]:
    return [c == "1" for c in text]


def test_reference_values() -> None:
    found = values(G, bits(P), bits(Y))
    assert found["demographic-parity-difference", ""] == 0.25
    assert found["equalized-odds-difference", ""] == 0.5
    assert (found["selection-rate", "a"], found["selection-rate", "b"]) == (0.5, 0.25)


@pytest.mark.parametrize("groups", [2, 4])
def test_disparities_are_fairlearns(groups: int) -> None:
    metrics = pytest.importorskip("fairlearn.metrics")
    rng = np.random.default_rng(groups)
    g = [f"g{i}" for i in rng.integers(0, groups, 400)]
    y, p = rng.random(400) < 0.4, rng.random(400) < 0.5
    found = values(g, p, y)
    for name in (
        "demographic_parity_difference",
        "demographic_parity_ratio",
        "equalized_odds_difference",
        "equalized_odds_ratio",
        "equal_opportunity_difference",
    ):
        expected = getattr(metrics, name)(y, p, sensitive_features=g)
        assert found[name.replace("_", "-"), ""] == pytest.approx(expected), name
    frame = metrics.MetricFrame(
        metrics={"tpr": metrics.true_positive_rate, "fpr": metrics.false_positive_rate},
        y_true=y, y_pred=p, sensitive_features=g,
    ).by_group  # fmt: skip
    for name in set(g):
        for rate in ("tpr", "fpr"):
            assert found[rate, name] == pytest.approx(frame.loc[name, rate])


def test_without_labels_there_are_only_selection_rates() -> None:
    assert {m for m, _ in values(G, bits(P), None)} == {
        "demographic-parity-difference", "demographic-parity-ratio", "selection-rate"}  # fmt: skip


def test_a_group_without_positive_labels_has_no_odds() -> None:
    found = values("aabb", bits("1010"), bits("1000"))
    assert found["equalized-odds-difference", ""] is None
    assert found["demographic-parity-difference", ""] == 0.0


def twins(**fields: list[Any]) -> list[dict[str, Any]]:
    """Sources 0 and 1; 0 has two twins, of gender and of age."""
    base = [{"id": "0"}, {"id": "0g", "twin_of": "0", "twin_axis": "gender"},
            {"id": "0a", "twin_of": "0", "twin_axis": "age"}, {"id": "1"},
            {"id": "1g", "twin_of": "1", "twin_axis": "gender"}]  # fmt: skip
    return [{**r, **{k: v[i] for k, v in fields.items()}} for i, r in enumerate(base)]


def test_consistency_of_predictions() -> None:
    pairs = consistency.pair(twins())
    made, _ = consistency.of_predictions(pairs, ["x", "y", "x", "x", "x"])
    found = {m.group: (m.value, m.n, len(m.columns)) for m in made}
    assert found == {"": (pytest.approx(1 / 3), 3, 2), "age": (0.0, 1, 1), "gender": (0.5, 2, 2)}


def test_consistency_of_scores() -> None:
    """Sources 0 and 2 have a standard deviation of 1: a move of .2 counts, one of .05 does not."""
    made, _ = consistency.of_scores(consistency.pair(twins()), [0.0, 0.2, -0.05, 2.0, 2.0])
    found = {(m.metric, m.group): m.value for m in made}
    assert found["changed", ""] == pytest.approx(1 / 3)
    assert found["mean-move", ""] == pytest.approx((0.2 - 0.05 + 0) / 3)
    assert found["mean-move", "gender"] == pytest.approx(0.1)


def test_twins_without_sources() -> None:
    with pytest.raises(ToolError, match="no twin whose source is in the records"):
        consistency.pair([{"id": "0"}, {"id": "x", "twin_of": "9"}])


def test_a_language_model_chooses_the_likelier_answer(causal: Any) -> None:
    records = [{"prompt": "The early bird", "choices": [" catches", " worm", " xyz"]},
               {"prompt": "Measure twice", "chosen": "and cut", "rejected": "and out"}]  # fmt: skip
    first = [s.total for s in causal.continuations([("The early bird", c) for c in records[0]["choices"]])]
    second = [
        s.total for s in causal.continuations([("Measure twice", " and cut"), ("Measure twice", " and out")])
    ]
    assert choose(causal, records) == [int(np.argmax(first)), int(np.argmax(second))]


def test_outputs_of_a_classifier_and_a_reward_model(tmp_path: Path) -> None:
    import torch

    texts = ["She left.", "He left.", "They left early.", "Many hands", "Two hands make"]
    classifier = scorer(build_classifier(tmp_path / "c", 3))
    assert classifier.kind == "classifier"
    expected = []
    for text in texts:
        with torch.no_grad():
            logits = classifier.loaded.model(torch.tensor([classifier.loaded.tokenizer.encode(text)])).logits[
                0
            ]
        expected.append(f"LABEL_{int(logits.argmax())}")
    assert classifier.predict([{"text": t} for t in texts]) == expected
    made, _ = consistency.measure(classifier, twins(text=texts))
    assert made[0].value == pytest.approx(
        np.mean([expected[0] != expected[i] for i in (1, 2)] + [expected[3] != expected[4]])
    )
    reward = scorer(build_classifier(tmp_path / "r", 1))
    assert reward.kind == "reward"
    records = twins(prompt=["Who left?"] * 5, completion=texts)
    made, rows = consistency.measure(reward, records)
    scores = reward.scores(records)
    assert len(set(scores)) == 5
    assert [r["twin"] for r in rows] == [scores[i] for i in (1, 2, 4)]
    assert {m.metric for m in made} == {"changed", "mean-move"}


def predictions(path: Path, flipped: float = 0.0) -> Path:
    """200 records; group a is selected at .6, b at .3, closer by ``flipped``."""
    rows = []
    for i in range(200):
        group, at = ("a", 0.6) if i < 100 else ("b", 0.3 + flipped)
        rows.append({"id": i, "group": group, "label": i % 2 == 0, "prediction": (i % 100) < 100 * at})
    return write_jsonl(path, rows)


def test_predictions_command(workdir: Path, click_cli: Cli) -> None:
    predictions(workdir / "old.jsonl")
    predictions(workdir / "new.jsonl", 0.3)
    gates = ("--require-fall", "fairness.demographic-parity-difference")
    done = click_cli("bias-scan", "predictions", "old=old.jsonl", "new=new.jsonl", "--baseline", "old", "-o", "r", *gates,
                     "--json")  # fmt: skip
    assert done.code == 0, done.stderr
    found = done.json()["metrics"]
    assert found["fairness.old.demographic-parity-difference"] == pytest.approx(0.3)
    assert found["fairness.new.demographic-parity-difference-bias-change"] == pytest.approx(-0.3)
    done = click_cli(
        "bias-scan", "predictions", "old=new.jsonl", "new=old.jsonl", "--baseline", "old", "-o", "s", *gates
    )
    assert done.code == 1
    assert "not below zero" in done.error
    assert (workdir / "s" / "report.json").is_file()


@pytest.mark.parametrize(
    ("rows", "code", "message"),
    [
        ([{"group": "a"}], 65, "'prediction': absent"),
        ([{"group": "a", "prediction": "yes"}], 65, "must be true, false, 0 or 1, is 'yes'"),
        ([{"group": "a", "prediction": 1}] * 40, 65, "one group cannot be compared"),
        ([{"prediction": 1}] * 40, 65, "no record has 'prediction' and 'group'"),
        ([{"group": g, "prediction": 1, **({"label": 1} if g == "a" else {})} for g in "ab"], 65, "1 of 2 records have no 'label'"),
    ],
)  # fmt: skip
def test_bad_predictions(workdir: Path, click_cli: Cli, rows: list[Any], code: int, message: str) -> None:
    write_jsonl(workdir / "p.jsonl", rows)
    done = click_cli("bias-scan", "predictions", "p.jsonl", "-o", "r")
    assert done.code == code
    assert message in done.error
    assert not (workdir / "r").exists()
