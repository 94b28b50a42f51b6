"""What is saved scores the same wherever it is loaded, and however its texts are padded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import PROVERBS, Result, invoke, load_tool, write_jsonl

from tuneutils.shared import device  # noqa: F401

import torch  # isort: skip
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tuneutils.shared.artifact import load_manifest, verify
from tuneutils.shared.models import load_tokenizer, resolve
from tuneutils.shared.reward_model import load_classifier, load_reward_model
from tuneutils.shared.texts import encode_text

from .conftest import CPU, QUICK, contents, preferences, report_of

SCORED = preferences(6, start=100)


def scores_of(artifact: Path, folder: Path, *extra: str) -> list[list[float]]:
    path = write_jsonl(folder / "scored.jsonl", SCORED)
    done = invoke(load_tool("rm-train"), "score", str(path), "-m", str(artifact), "-q", *CPU, *extra)
    assert done.code == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in lines] == SCORED
    return [[r["score_chosen"], r["score_rejected"]] for r in lines]


def test_automodel_takes_an_adapter_s_folder_too(trained: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(trained, num_labels=1).eval()
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        assert model(input_ids=ids).logits.item() == pytest.approx(
            plain_model(trained)(input_ids=ids).logits.item()
        )


def plain_model(artifact: Path) -> Any:
    """The artifact as any user of Transformers and PEFT loads it."""
    config = artifact / "adapter_config.json"
    if not config.is_file():
        return AutoModelForSequenceClassification.from_pretrained(artifact).eval()
    base = json.loads(config.read_text())["base_model_name_or_path"]
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    return PeftModel.from_pretrained(model, str(artifact)).eval()


def texts(tokenizer: Any) -> list[list[int]]:
    return [
        encode_text(r["prompt"], r[side], tokenizer).ids for r in SCORED for side in ("chosen", "rejected")
    ]


def test_scores_are_those_of_automodel(trained: Path, tmp_path: Path) -> None:
    found = [s for pair in scores_of(trained, tmp_path, "--raw") for s in pair]
    tokenizer = load_tokenizer(str(trained))
    model = plain_model(trained)
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([ids])).logits.item() for ids in texts(tokenizer)]
    assert found == pytest.approx(alone, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(trained: Path, side: str) -> None:
    tokenizer = load_tokenizer(str(trained))
    rows = texts(tokenizer)
    rm = load_reward_model(str(trained), "cpu", "float32")
    alone = [rm.scores([row], 1, raw=True)[0] for row in rows]
    assert rm.scores(rows, len(rows), raw=True) == pytest.approx(alone, rel=1e-5, abs=1e-6)
    assert rm.scores(rows[::-1], 5, raw=True) == pytest.approx(alone[::-1], rel=1e-5, abs=1e-6)

    model = plain_model(trained)
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = side
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(**batch, position_ids=positions).logits[:, 0]
    assert padded.tolist() == pytest.approx(alone, rel=1e-5, abs=1e-6)


def test_the_score_is_read_at_the_eos_that_closes_the_answer(trained: Path) -> None:
    """The template writes a newline after its EOS, which a policy's rollout does not have."""
    tokenizer = load_tokenizer(str(trained))
    text = encode_text("Say 1.", "One.", tokenizer)
    eos = tokenizer.eos_token_id
    assert text.ids[-1] == eos
    assert text.ids.count(eos) == 2  # of the user's turn and of the answer
    assert tokenizer.decode(text.ids).endswith("<|im_start|>assistant\nOne.<|im_end|>")
    assert text.completion == len(tokenizer("One.", add_special_tokens=False).input_ids)
    assert tokenizer.decode(text.ids[text.prompt :]) == "One.<|im_end|>"
    plain = encode_text("Say 1.", " One.", tokenizer, "none")
    assert tokenizer.decode(plain.ids) == "Say 1. One.<|im_end|>"


def test_ppo_run_reads_the_same_scores(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    from tuneutils.tools.ppo_run.prompts import Prompt
    from tuneutils.tools.ppo_run.reward_model import load_reward_model as load_as_reward
    from tuneutils.tools.ppo_run.rewards import Episode

    tokenizer = load_tokenizer(str(tiny_model))
    theirs = load_as_reward(str(trained), tokenizer, torch.device("cpu"), torch.float32)
    normalisation = load_manifest(trained)["reward_normalisation"]
    assert (theirs.mean, theirs.std) == (normalisation["mean"], normalisation["std"])
    episodes = []
    for record in SCORED:
        for side in ("chosen", "rejected"):
            text = encode_text(record["prompt"], record[side], tokenizer)
            response = tuple(text.ids[text.prompt : -1])  # without EOS: it appends its own
            episodes.append(Episode(Prompt(tuple(text.ids[: text.prompt]), "", "x:1"), response, True, ""))
    found = [s for pair in scores_of(trained, tmp_path) for s in pair]
    assert theirs(episodes) == pytest.approx(found, rel=1e-4, abs=1e-4)


def test_an_adapter_turned_off_is_the_base(trained: Path, tiny_model: Path) -> None:
    if not (trained / "adapter_config.json").is_file():
        pytest.skip("a full model has no adapter")
    ids = torch.arange(20, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_model).model.eval()
    model = plain_model(trained)
    trunk = model.base_model.model.model
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(trunk(ids).last_hidden_state, base(ids).last_hidden_state)
    with torch.no_grad():
        assert not torch.equal(trunk(ids).last_hidden_state, base(ids).last_hidden_state)
    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert "score" in config["modules_to_save"]


def test_merged_scores_are_those_of_the_adapter(
    rm: Callable[..., Result], records: Path, workdir: Path
) -> None:
    assert rm(records, "-q", *QUICK, output="adapter").code == 0
    done = rm(records, "-q", *QUICK, "--merge", output="merged")
    assert done.code == 0, done.stderr
    assert not (workdir / "merged" / "adapter_config.json").exists()
    apart, merged = (scores_of(workdir / name, workdir, "--raw") for name in ("adapter", "merged"))
    for ours, expected in zip(merged, apart, strict=True):
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_normalised_scores_of_the_training_answers_have_mean_0_and_std_1(
    rm: Callable[..., Result], records: Path, workdir: Path
) -> None:
    args = (records, "-q", *QUICK, "--eval-share", "0")
    for which, sides in (("chosen", ("chosen",)), ("all", ("chosen", "rejected"))):
        assert rm(*args, "--normalise", which, output=which).code == 0
        done = invoke(load_tool("rm-train"), "score", str(records), "-m", which, "-q", *CPU)
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        values = torch.tensor([r[f"score_{s}"] for r in rows for s in sides], dtype=torch.float64)
        assert values.mean().item() == pytest.approx(0, abs=1e-4)
        assert values.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    demonstrations = [{"prompt": f"Say {i}.", "completion": p} for i, p in enumerate(PROVERBS)]
    path = write_jsonl(workdir / "demonstrations.jsonl", demonstrations)
    assert rm(*args, "--normalise", path, output="file").code == 0
    done = invoke(load_tool("rm-train"), "score", str(path), "-m", "file", "-q", *CPU)
    values = torch.tensor([json.loads(line)["score"] for line in done.stdout.splitlines()])
    assert values.mean().item() == pytest.approx(0, abs=1e-4)
    assert rm(*args, "--normalise", "none", output="none").code == 0
    assert "reward_normalisation" not in load_manifest(workdir / "none")


def test_a_reward_model_can_be_trained_further(
    rm: Callable[..., Result], trained: Path, records: Path
) -> None:
    """Its head is kept: at learning rate 0 the scores stay."""
    if (trained / "adapter_config.json").is_file():
        done = rm(records, model=trained)
        assert (done.code, "merge it" in done.error) == (2, True)
        return
    done = rm(records, "-q", "--method", "full", "--learning-rate", "0", model=trained)
    assert done.code == 0, done.stderr
    assert scores_of(Path("out"), Path(), "--raw") == scores_of(trained, Path(), "--raw")


def test_the_artifact_is_whole_and_says_what_it_is(trained: Path) -> None:
    assert verify(trained) == []
    manifest = load_manifest(trained)
    assert manifest["kind"] == "reward-model"
    assert manifest["reward_text"] == {"template": "auto", "max_length": 128}
    assert {"report.json", "evaluation.png", "log.jsonl", "plots/calibration.json"} <= set(contents(trained))
    report = report_of(trained)
    assert set(report["by_split"]) == {"train", "heldout"}
    assert report["pairs"] == report["by_split"]["heldout"]["n"]
    assert manifest["metrics"]["accuracy"] == report["accuracy"]
    assert report["best_of_n"][0]["value"]["value"] == pytest.approx(0.5)
    assert report["best_of_n"][1]["value"]["value"] == pytest.approx(report["accuracy"]["value"])


def test_a_new_head_is_refused_where_one_is_wanted(tiny_model: Path) -> None:
    from tuneutils.shared.errors import ToolError

    with pytest.raises(ToolError, match=r"score.weight is not in its files; train one with rm-train"):
        load_reward_model(str(tiny_model), "cpu", "float32")
    made = load_classifier(resolve(str(tiny_model)), torch.device("cpu"), torch.float32, 1, new_head_seed=0)
    assert made.score.weight.dtype == torch.float32
