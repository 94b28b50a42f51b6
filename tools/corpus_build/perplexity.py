"""Three equal buckets of perplexity under a small model, after CCNet (Wenzek et al. 2020, section 4.3)."""

from __future__ import annotations

import numpy as np

from tuneutils.shared.command import Run
from tuneutils.tools.corpus_build.params import PERPLEXITY_BUCKETS, BuildParams
from tuneutils.tools.corpus_build.pool import Pool

CHARACTERS = 2000


def drop_buckets(run: Run[BuildParams], pool: Pool) -> None:
    """Drop the living documents outside of ``params.perplexity_keep``.

    Perplexity is of the first ``CHARACTERS`` of each; head is the third with the lowest, the texts that the
    model finds likeliest.
    """
    from tuneutils.shared.evaluate_model import score_sequences, text_sequence
    from tuneutils.shared.models import load_model
    from tuneutils.shared.supervise import Encoded

    living = pool.living()
    loaded = load_model(str(run.params.perplexity_model), device=run.device, dtype=run.dtype)
    length = min(getattr(loaded.model.config, "max_position_embeddings", None) or 512, 512)
    whole = [text_sequence(text[:CHARACTERS], loaded.tokenizer) for text in pool.texts(living)]
    sequences = [Encoded(s.input_ids[:length], s.labels[:length]) for s in whole]
    scores = score_sequences(loaded, sequences)
    bits = np.array([-s.logprob / max(s.tokens, 1) for s in scores])
    for document, bucket in zip(living.tolist(), buckets(bits), strict=True):
        if bucket not in run.params.perplexity_keep:
            pool.drop(document, f"perplexity {bucket}")


def buckets(values: np.ndarray) -> list[str]:
    """The third that each value is in, the lowest first; equal values by their order."""
    rank = np.empty(len(values), np.int64)
    rank[np.argsort(values, kind="stable")] = np.arange(len(values))
    return [PERPLEXITY_BUCKETS[3 * int(r) // max(len(values), 1)] for r in rank]
