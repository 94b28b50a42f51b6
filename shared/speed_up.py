"""How much faster a smaller model is; belongs in the run log, since it depends on clock and machine."""

from __future__ import annotations

import time
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip

from tuneutils.shared.evaluate import ratio_estimate
from tuneutils.shared.sample import Sampling, generate

PROMPT_TOKENS = 128
NEW_TOKENS = 16
REPEATS = 5


def speed_up(original: Any, smaller: Any, pad_id: int) -> dict[str, Any]:
    """The original's time over the smaller model's for a forward pass and greedy decoding, run in turns.

    Returns:
        For each a ratio with its interval over paired repeats, and tokens/s of both.
    """
    vocabulary = smaller.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    made: dict[str, Any] = {}
    for what, tokens in (("prefill", PROMPT_TOKENS), ("decode", NEW_TOKENS)):
        times: list[list[float]] = [[], []]
        for repeat in range(REPEATS + 1):  # the first one warms up
            for model, kept in zip((original, smaller), times, strict=True):
                started = time.perf_counter()
                _work(model, ids, what, pad_id)
                if repeat:
                    kept.append(time.perf_counter() - started)
        made[what] = {
            "speed_up": ratio_estimate(times[0], times[1]).as_json(),
            "original_tokens_per_s": tokens * REPEATS / sum(times[0]),
            "smaller_tokens_per_s": tokens * REPEATS / sum(times[1]),
        }
    return made


@torch.inference_mode()
def _work(model: Any, ids: Any, what: str, pad_id: int) -> None:
    ids = ids.to(next(model.parameters()).device)
    if what == "prefill":
        model(input_ids=ids, use_cache=False)
    else:
        sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0)
        generate(model, [ids[0, :8].tolist()], sampling, pad_token_id=pad_id)
    if ids.device.type == "cuda":
        torch.cuda.synchronize()
