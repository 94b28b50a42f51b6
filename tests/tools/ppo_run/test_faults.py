"""What goes wrong is named, with its place and what to do; nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Result, build_tiny_model, environment, tiny_records, tool_args, write_jsonl
from transformers import AutoTokenizer

from tuneutils.tools.ppo_run.diagnose import DIAGNOSES, diagnose

from .conftest import CPU, SMALL, log_of
from .setup import build_reward_model, params_of


def nothing_left(folder: Path) -> bool:
    return not (folder / "out").exists()


def test_nan_in_the_reward_names_the_prompt(ppo: Callable[..., Result], prompts: Path, workdir: Path) -> None:
    Path("nan_reward.py").write_text(
        "def score(prompts, completions):\n"
        "    return [float('nan') if p.endswith('7.') else len(c) for p, c in zip(prompts, completions)]\n"
    )
    done = ppo(prompts, "-r", "nan_reward:score", "--batch-size", "10")
    assert done.code == 65
    assert done.error.startswith("prompts.jsonl:8: the reward is nan for the prompt 'Say proverb 7.'")
    assert nothing_left(workdir)


def test_constant_reward(ppo: Callable[..., Result], prompts: Path, workdir: Path) -> None:
    Path("flat_reward.py").write_text("def score(prompts, completions): return [0.5] * len(prompts)\n")
    done = ppo(prompts, "-r", "flat_reward:score", "--updates", "9")
    assert done.code == 1
    assert "reward of every completion was 0.5 in 3 batches" in done.error
    assert "constant-reward: all completions of the batch have one reward" in done.stderr
    assert nothing_left(workdir)


def test_prompts_longer_than_the_context(ppo: Callable[..., Result], workdir: Path) -> None:
    records = [*tiny_records("prompt", 3), {"prompt": "on and " * 60}, *tiny_records("prompt", 2)]
    write_jsonl(workdir / "long.jsonl", records)
    done = ppo("long.jsonl", "-r", "builtin:length")
    assert done.code == 65
    assert done.error.startswith("long.jsonl:4: the prompt's ")
    assert "exceed the context of 128 (--too-long drop" in done.error
    done = ppo("long.jsonl", "-r", "builtin:length", "--too-long", "drop", "--updates", "1")
    assert done.code == 0, done.stderr
    assert "1 prompts too long left out" in done.stderr


def test_a_model_without_pad_token(ppo: Callable[..., Result], prompts: Path, tmp_path: Path) -> None:
    """One that nothing else uses is taken; pad = eos is never used, and a model with neither is refused."""
    model = build_tiny_model(tmp_path / "nopad")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(model)
    done = ppo(prompts, "-r", "builtin:length", "--updates", "1", model=model)
    assert done.code == 0, done.stderr
    saved = AutoTokenizer.from_pretrained("out")
    assert saved.pad_token_id != saved.eos_token_id

    from .bandit import WORDS, build_bandit, word_tokenizer

    bare = build_bandit(tmp_path / "bare")
    word_tokenizer(("nothing", *WORDS[1:]), pad="<eos>").save_pretrained(bare)
    refused = ppo(prompts, "-r", "builtin:length", model=bare, output="other")
    assert (refused.code, "no token to pad with but EOS" in refused.error) == (65, True)


def test_out_of_memory_names_the_batch_sizes_to_try(prompts: Path, workdir: Path) -> None:
    """A process with too little address space for a whole batch at once."""
    model = build_tiny_model(
        workdir / "wide", hidden_size=512, intermediate_size=8192, max_position_embeddings=2048
    )
    args = [
        *tool_args("ppo-run"),
        "train",
        "-m",
        str(model),
        "-r",
        "builtin:length",
        "-o",
        "out",
        str(prompts),
    ]
    args += [*CPU, *SMALL, "--batch-size", "64", "--micro-batch-size", "64", "--rollout-batch-size", "32"]
    args += ["--max-new-tokens", "30", "--updates", "1"]
    code = (
        "import resource, runpy, sys\n"
        "from tuneutils.shared import device\n"
        "import torch, transformers.models.llama.modeling_llama, peft\n"
        "import tuneutils.tools.ppo_run.train\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (350 << 20),) * 2)\n"
        f"sys.argv = {['ppo-run', *args[2:]]!r}\n"
        "from tuneutils.tools.ppo_run.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        cwd=workdir,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 75, done.stderr
    assert "out of memory; try --micro-batch-size 32 and --rollout-batch-size 16" in done.stderr
    assert nothing_left(workdir)


def test_an_adapter_as_the_model(ppo: Callable[..., Result], prompts: Path) -> None:
    done = ppo(prompts, "-r", "builtin:length", "--updates", "1")
    assert done.code == 0, done.stderr
    done = ppo(prompts, "-r", "builtin:length", model=Path("out"), output="second")
    assert (done.code, "merge it into its base first (adapter-merge)" in done.error) == (2, True)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--minibatches", "7"], "more than the 6 episodes"),
        (["--value", "reward"], "needs a reward model as --reward"),
        (["--method", "prefx"], "did you mean 'prefix'?"),
        (["--kl-target", "0"], "must be above 0"),
        (["--dtype", "float16"], "use bfloat16 or float32 with PPO"),
    ],
)
def test_contradictions(args: list[str], says: str, ppo: Callable[..., Result], prompts: Path) -> None:
    done = ppo(prompts, "-r", "builtin:length", *args)
    assert (done.code, says in done.error) == (2, True), done.stderr


def test_stops_on_the_kl_budget(ppo: Callable[..., Result], prompts: Path, workdir: Path) -> None:
    args = [
        prompts,
        "-r",
        "builtin:length",
        "--updates",
        "30",
        "--learning-rate",
        "0.01",
        "--kl-budget",
        "0.5",
    ]
    done = ppo(*args)
    assert done.code == 0, done.stderr
    log = log_of(workdir / "out")
    assert len(log) < 30
    assert [line["kl"] > 0.5 for line in log] == [False] * (len(log) - 1) + [True]
    assert json.loads((workdir / "out/artifact.json").read_text())["metrics"]["stopped"] == "kl_budget"


def line(update: int = 1, **changes: float) -> dict[str, float]:
    healthy = {
        "update": update,
        "reward": 1.0,
        "reward_std": 0.5,
        "kl": 1.0,
        "length": 20.0,
        "finished": 0.9,
        "clip_fraction": 0.1,
        "explained_variance": 0.5,
        "first_ratio_deviation": 0.0,
    }
    return {**healthy, **changes}


@pytest.mark.parametrize(
    ("name", "log"),
    [
        ("ratio", [line(first_ratio_deviation=0.01)]),
        ("constant-reward", [line(reward_std=0.0)]),
        ("negative-kl", [line(i, kl=-float(i)) for i in (1, 2, 3)]),
        ("exploding-kl", [line(kl=500.0)]),
        ("length", [line(length=53.0, finished=0.0)]),
        ("clip-fraction", [line(clip_fraction=0.4)]),
        ("explained-variance", [line(i, explained_variance=-0.1) for i in range(1, 6)]),
    ],
)
def test_diagnoses_are_named(name: str, log: list[dict[str, float]], tiny_model: Path) -> None:
    warned: dict[str, int] = {}
    params = params_of(tiny_model)
    found = [w for i in range(len(log)) for w in diagnose(log[: i + 1], params, warned)]
    assert found == [f"{name}: {DIAGNOSES[name][1]}"]
    assert diagnose([*log, log[-1]], params, warned) == []
    assert diagnose([line()], params, {}) == []


def test_dry_run_counts_without_loading(ppo: Callable[..., Result], prompts: Path, workdir: Path) -> None:
    """LoRA of rank 16 on seven linear layers of two blocks: r (in + out) parameters each."""
    done = ppo(prompts, "-r", "builtin:length", "--dry-run", "--updates", "5", "--ppo-epochs", "3")
    assert done.code == 0, done.stderr
    shown = done.json()
    widths = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    assert shown["trainable_parameters"] == 2 * sum(16 * (i + o) for i, o in widths)
    assert (shown["episodes"], shown["optimizer_steps"]) == (30, 15)
    assert (shown["learning_rate"], shown["value_learning_rate"]) == (pytest.approx(2e-5), 1e-4)
    assert nothing_left(workdir)


@pytest.mark.parametrize("body", ["raise ValueError('no')", "def score(:", "raise SystemExit(3)"])
def test_a_reward_that_cannot_be_imported_is_its_author_s(
    body: str, ppo: Callable[..., Result], prompts: Path, workdir: Path
) -> None:
    name = f"broken_{abs(hash(body)) % 10**6}"
    Path(f"{name}.py").write_text(body + "\n")
    done = ppo(prompts, "-r", f"{name}:score")
    assert done.code == 65
    assert f"--reward {name}:score: importing it raised" in done.error


@pytest.mark.parametrize("spec", ["builtin:length:inf", "builtin:length:5:7", "builtin:length:nan"])
def test_a_number_that_is_none_is_refused(spec: str, ppo: Callable[..., Result], prompts: Path) -> None:
    assert ppo(prompts, "-r", spec).code == 2


def test_a_password_in_a_url_is_refused(ppo: Callable[..., Result], prompts: Path, workdir: Path) -> None:
    done = ppo(prompts, "-r", "http://user:s3cret@127.0.0.1:9/x")
    assert done.code == 2
    assert "s3cret" not in done.stderr
    assert nothing_left(workdir)


def test_a_reward_model_of_another_template_is_refused(
    ppo: Callable[..., Result], prompts: Path, tiny_model: Path
) -> None:
    folder = build_reward_model(Path("rm"), tiny_model)
    manifest = {"schema": 1, "kind": "reward-model", "reward_text": {"template": "none"}}
    (folder / "artifact.json").write_text(json.dumps(manifest))
    done = ppo(prompts, "-r", folder, "--template", "chat")
    assert done.code == 65
    assert "was trained with --template none" in done.error


@pytest.mark.parametrize("flag", ["--gae-lambda=0.1", "--value-coef=3", "--value=policy"])
def test_kin_refuse_what_they_would_not_heed(flag: str, ppo: Callable[..., Result], prompts: Path) -> None:
    done = ppo(prompts, "-r", "builtin:length", "--algo", "rloo", flag)
    assert done.code == 2
    assert "goes with --algo ppo alone" in done.error


def test_weights_within_the_kl_budget_beat_those_beyond_it() -> None:
    from tuneutils.tools.ppo_run.train import _rank

    params = params_of(Path("m"), kl_budget=1.0)
    beyond, within, better = ({"rewards": [r], "kl": [kl]} for r, kl in ((5.0, 9.0), (4.0, 0.5), (4.5, 0.9)))
    assert _rank(params, beyond) < _rank(params, within) < _rank(params, better)
    assert _rank(params_of(Path("m")), within) < _rank(params_of(Path("m")), beyond)
