"""Scores of compressed models beside the original on the same held-out windows, and what follows from them.

Intervals are 95 % bootstrap percentiles over windows; orderings are paired differences, true when the
interval lies on one side of 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import numpy as np
import torch
from torch import Tensor

from tuneutils.shared.calibration import calibration_ids
from tuneutils.shared.evaluate import Estimate, paired_difference, ratio_estimate
from tuneutils.shared.four_bit import keep_4bit_layout
from tuneutils.shared.models import load_model

Scores = dict[str, np.ndarray]


class Heldout:
    """The original's logits on some windows of a text, and other models' scores beside it.

    Attributes:
        ids: ``(windows, length)``.
        base: the original's logits, bfloat16.
        scores: name -> sums over each window.
        rows: name -> what is printed.
    """

    def __init__(
        self, model: str, text: str, *, windows: int, length: int, dtype: str, keep: Path | None = None
    ) -> None:
        """With ``keep``, a folder, what was scored there with the same arguments is not scored again."""
        self.dtype, self._keep = dtype, keep
        self._asked = asked = {
            "model": model,
            "text": text,
            "windows": windows,
            "length": length,
            "dtype": dtype,
        }
        if keep and (keep / "heldout.json").exists():
            kept = json.loads((keep / "heldout.json").read_text())
            if kept["asked"] != asked:
                raise SystemExit(f"{keep}: was begun with {kept['asked']}")
            self.ids, self.base = torch.load(keep / "base.pt")
            self.scores = {n: {k: np.array(v) for k, v in s.items()} for n, s in kept["scores"].items()}
            self.rows = kept["rows"]
            return
        loaded = load_model(model, device="cpu", dtype=dtype)
        self.ids = calibration_ids([text], loaded.tokenizer, rows=windows, length=length, seed=1)
        self.base = [logits.to(torch.bfloat16) for logits in all_logits(loaded.model, self.ids)]
        self.scores = {"original": score(self.base, self.base, self.ids)}
        self.rows = {"original": self._row("original")}
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            torch.save((self.ids, self.base), keep / "base.pt")
        self._save()

    def _save(self) -> None:
        if self._keep:
            scores = {n: {k: v.tolist() for k, v in s.items()} for n, s in self.scores.items()}
            made = {"asked": self._asked, "scores": scores, "rows": self.rows}
            (self._keep / "heldout.json").write_text(json.dumps(made))

    def add(self, name: str, folder: Path, **known: Any) -> dict[str, Any]:
        """Score a model; ``known`` goes into its row."""
        model = load_model(str(folder), device="cpu", dtype=self.dtype).model
        keep_4bit_layout(model)
        self.scores[name] = score(self.base, all_logits(model, self.ids), self.ids)
        self.rows[name] = self._row(name) | known
        self._save()
        return self.rows[name]

    def _row(self, name: str) -> dict[str, Any]:
        own, original = self.scores[name], self.scores["original"]
        loss = paired_difference(own["nll"], original["nll"], own["tokens"], original["tokens"])
        return {
            "perplexity": ratio_estimate(own["nll"], own["tokens"], transform=np.exp).as_json(),
            "perplexity_change": [math.exp(v or 0) - 1 for v in (loss.value, loss.low, loss.high)],
            "kl": ratio_estimate(own["kl"], own["tokens"]).as_json(),
            "top1": ratio_estimate(own["agree"], own["tokens"]).as_json(),
        }

    def orderings(self, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """Of each pair, whether the first's loss and KL are below the second's."""
        return [ordering(a, b, self.scores) for a, b in pairs if a in self.scores and b in self.scores]


@torch.no_grad()
def all_logits(model: Any, ids: Tensor) -> list[Tensor]:
    """``(length - 1, vocabulary)`` a window."""
    return [model(window[None]).logits[0, :-1] for window in ids]


def score(base: list[Tensor], logits: list[Tensor], ids: Tensor) -> Scores:
    """Sums over each window: negative log-likelihood, KL from the original, agreements, tokens."""
    found: dict[str, list[float]] = {"nll": [], "kl": [], "agree": [], "tokens": []}
    for one, other, window in zip(base, logits, ids, strict=True):
        p, q = one.float().log_softmax(-1), other.float().log_softmax(-1)
        found["nll"].append(-float(q.gather(-1, window[1:, None]).sum()))
        found["kl"].append(float((p.exp() * (p - q)).sum()))
        found["agree"].append(float((p.argmax(-1) == q.argmax(-1)).sum()))
        found["tokens"].append(float(len(window) - 1))
    return {name: np.array(values) for name, values in found.items()}


def ordering(better: str, worse: str, scores: dict[str, Scores]) -> dict[str, Any]:
    """Whether one model's loss and KL are below another's, by paired windows."""
    found: dict[str, Any] = {"better": better, "worse": worse}
    for name in ("nll", "kl"):
        a, b = scores[better], scores[worse]
        gap: Estimate = paired_difference(a[name], b[name], a["tokens"], b["tokens"])
        assert gap.low is not None
        assert gap.high is not None
        verdict = "true" if gap.high < 0 else "false" if gap.low > 0 else "open"
        found[name] = gap.as_json() | {"holds": verdict}
    return found


def table(rows: dict[str, dict[str, Any]], orderings: list[dict[str, Any]], columns: Sequence[str]) -> str:
    """Markdown: a row a model, then a row an ordering; ``columns`` are further keys of the rows."""
    lines = [
        f"| model | perplexity | change | KL | top-1 | {' | '.join(columns)} |",
        "|---|---|---|---|---|" + "---|" * len(columns),
    ]
    for name, r in rows.items():
        change = "{:+.1%} [{:+.1%}, {:+.1%}]".format(*r["perplexity_change"])
        kl = "{value:.4f} [{low:.4f}, {high:.4f}]".format(**r["kl"])
        further = " | ".join(str(r.get(c, "")) for c in columns)
        perplexity, top1 = r["perplexity"]["value"], r["top1"]["value"]
        lines.append(f"| {name} | {perplexity:.2f} | {change} | {kl} | {top1:.3f} | {further} |")
    if orderings:
        lines += ["", "| ordering | loss, nats a token | KL | holds |", "|---|---|---|---|"]
    for o in orderings:
        gaps = ["{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**o[name]) for name in ("nll", "kl")]
        verdict = "/".join(o[name]["holds"] for name in ("nll", "kl"))
        lines.append(f"| {o['better']} < {o['worse']} | {gaps[0]} | {gaps[1]} | {verdict} |")
    return "\n".join(lines)


def last_line(path: Path) -> dict[str, Any]:
    """The last line of a run log."""
    return dict(json.loads(path.read_text(encoding="utf-8").splitlines()[-1]))
