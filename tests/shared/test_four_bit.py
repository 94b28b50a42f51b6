"""A 4-bit model that is evaluated, then saved or trained: bitsandbytes repacks its weights unless kept from it.

On processors with AVX512-BF16 both fail without :func:`keep_4bit_layout`; on others they hold anyway.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support import build_tiny_model

from tuneutils.shared.four_bit import BNB_SCHEMES, keep_4bit_layout
from tuneutils.shared.models import load_model

# isort: split
import torch

pytest.importorskip("bitsandbytes")
IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("4bit") / "m", hidden_size=64, intermediate_size=128)


@pytest.mark.parametrize("scheme", BNB_SCHEMES)
def test_saved_after_an_evaluation_it_is_the_same_model(scheme: str, wide: Path, tmp_path: Path) -> None:
    model = load_model(str(wide), device="cpu", dtype="float32", quantization=scheme).model
    keep_4bit_layout(model)
    with torch.no_grad():
        before = model.eval()(IDS).logits
    model.save_pretrained(tmp_path / "saved")
    again = load_model(str(wide), device="cpu", dtype="float32").tokenizer
    again.save_pretrained(tmp_path / "saved")
    loaded = load_model(str(tmp_path / "saved"), device="cpu", dtype="float32").model
    keep_4bit_layout(loaded)
    with torch.no_grad():
        after = loaded.eval()(IDS).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_an_evaluation_leaves_the_layout_that_has_a_gradient(wide: Path) -> None:
    model = load_model(str(wide), device="cpu", dtype="float32", quantization="nf4").model
    keep_4bit_layout(model)

    def gradient() -> torch.Tensor:
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model.train()(inputs_embeds=embedded).logits.square().mean().backward()
        assert embedded.grad is not None
        return embedded.grad

    before = gradient()
    with torch.no_grad():
        model.eval()(IDS)
    torch.testing.assert_close(gradient(), before)
