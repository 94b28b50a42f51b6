"""Rewards of every kind: built in, a function of the user's, served over HTTP, a reward model."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support import Result, build_tiny_model
from transformers import AutoModelForSequenceClassification

from tuneutils.shared import device  # noqa: F401

import torch  # isort: skip

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.models import load_tokenizer
from tuneutils.tools.ppo_run.prompts import Prompt
from tuneutils.tools.ppo_run.rewards import Endpoint, Episode, checked, kind_of, text_reward

from .bandit import word_tokenizer
from .conftest import log_of
from .setup import build_reward_model, episodes_of, reward_model_of


def said(*texts: str) -> list[Episode]:
    return [Episode(Prompt((5,), f"q{i}", f"in.jsonl:{i + 1}"), (6,), True, t) for i, t in enumerate(texts)]


def test_builtin_rewards() -> None:
    texts = said("", "Good, good: bad.", "It's one two", "awful")
    assert text_reward("builtin:length")(texts) == [0, 3, 3, 1]
    assert text_reward("builtin:length:2")(texts) == [-1.0, -0.5, -0.5, -0.5]
    assert text_reward("builtin:sentiment")(texts) == [0, 1 / 4, 0, -1 / 2]


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("builtin:length", "builtin"),
        ("http://127.0.0.1:1/score", "http"),
        ("https://x/y", "http"),
        ("my.rewards:score", "function"),
        ("artifacts/rm", "model"),
        ("org/name@main", "model"),
    ],
)
def test_kind_of(spec: str, kind: str) -> None:
    assert kind_of(spec) == kind


def test_scores_are_checked() -> None:
    two = said("a", "b")
    assert checked(two, (1, 2)) == [1.0, 2.0]
    with pytest.raises(ToolError, match="gave 1 scores for 2 completions"):
        checked(two, [1.0])
    with pytest.raises(ToolError, match="list of numbers"):
        checked(two, ["high", "low"])
    with pytest.raises(ToolError, match=r"in.jsonl:2: the reward is nan for the prompt 'q1' .* 'b'"):
        checked(two, [1.0, float("nan")])


class Server(BaseHTTPRequestHandler):
    """Answers as the test says: each entry of ``replies`` is a status and a body, or seconds to wait."""

    replies: list[Any] = []  # noqa: RUF012 - set by each test
    requests: list[Any] = []  # noqa: RUF012
    paths: list[Any] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.paths.append(self.path)
        self.requests.append((self.headers["Content-Type"], body))
        reply = self.replies.pop(0) if self.replies else (200, None)
        if isinstance(reply, float):
            time.sleep(reply)
            reply = (200, None)
        status, text = reply
        if text is None:
            text = json.dumps({"rewards": [len(c) / 10 for c in body["completions"]]})
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[Server]]]:
    Server.replies, Server.requests, Server.paths = [], [], []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_address[1]}/score", Server
    http.shutdown()
    thread.join()
    http.server_close()


class TestEndpoint:
    def test_is_asked_and_answers(self, server: tuple[str, type[Server]]) -> None:
        url, handler = server
        assert text_reward(url)(said("four", "sixsix")) == [0.4, 0.6]
        sent = {"prompts": ["q0", "q1"], "completions": ["four", "sixsix"]}
        assert handler.requests == [("application/json", sent)]
        handler.replies = [(200, "[1, 2.5]")]
        assert text_reward(url)(said("a", "b")) == [1.0, 2.5]

    def test_tries_again(self, server: tuple[str, type[Server]]) -> None:
        url, handler = server
        handler.replies = [(503, "busy"), (429, "slow down"), 0.6]
        found = Endpoint(url, timeout_s=0.3, retries=3, pause_s=0.01)(["q"], ["four"])
        assert found == [0.4]
        assert len(handler.requests) == 4

    def test_gives_up_and_says_so(self, server: tuple[str, type[Server]]) -> None:
        url, handler = server
        handler.replies = [(500, "broken")] * 2
        with pytest.raises(ToolError, match="no answer in 2 tries of 1 s: HTTP 500") as failed:
            Endpoint(url, 1.0, retries=1, pause_s=0.01)(["q"], ["c"])
        assert failed.value.code == ExitCode.RETRYABLE
        with pytest.raises(ToolError, match="Connection refused"):
            Endpoint("http://127.0.0.1:9/", 1.0, retries=0)(["q"], ["c"])

    @pytest.mark.parametrize(
        ("reply", "says"),
        [
            ((403, "no"), "refused: HTTP 403"),
            ((200, "<html>"), "not JSON"),
            ((200, '{"scores": [1]}'), "the answer must be"),
        ],
    )
    def test_bad_answers_are_not_repeated(
        self, reply: tuple[int, str], says: str, server: tuple[str, type[Server]]
    ) -> None:
        url, handler = server
        handler.replies = [reply]
        with pytest.raises(ToolError, match=says) as failed:
            Endpoint(url, 1.0, retries=3)(["q"], ["c"])
        assert failed.value.code == ExitCode.BAD_DATA
        assert len(handler.requests) == 1

    def test_trains(
        self, server: tuple[str, type[Server]], ppo: Callable[..., Result], prompts: Path
    ) -> None:
        done = ppo(prompts, "-r", server[0], "--updates", "1")
        assert done.code == 0, done.stderr
        assert len(server[1].requests) == 1
        manifest = json.loads(Path("out/artifact.json").read_text())
        assert {i["role"]: i["path"] for i in manifest["inputs"]}["reward"] == server[0]

    def test_secrets_in_its_url_are_sent_and_not_recorded(
        self, server: tuple[str, type[Server]], ppo: Callable[..., Result], prompts: Path, workdir: Path
    ) -> None:
        url = server[0] + "?model=big&api_key=s3cret&pin=s3cret2"
        done = ppo(prompts, "-r", url, "--updates", "2", "--checkpoint-every", "1", "-v", "--json")
        assert done.code == 0, done.stderr
        assert set(server[1].paths) == {"/score?model=big&api_key=s3cret&pin=s3cret2"}
        written = [p for p in workdir.rglob("*") if p.is_file()]
        assert any(p.name == "artifact.json" for p in written)
        assert any(p.name == "run.jsonl" for p in written)
        assert [p for p in written if b"s3cret" in p.read_bytes()] == []
        assert "s3cret" not in done.stdout + done.stderr
        manifest = json.loads(Path("out/artifact.json").read_text())
        digest = hashlib.sha256(b"big").hexdigest()[:8]
        assert f"?model={digest}&api_key=***&pin=" in manifest["params"]["reward"]["value"]
        server[1].replies = [(403, "no")]
        refused = ppo(prompts, "-r", url, output="other")
        assert (refused.code, "s3cret" in refused.stderr) == (65, False)
        shown = ppo(prompts, "-r", url, "--dry-run", output="third")
        assert (shown.code, "s3cret" in shown.stdout) == (0, False)

    def test_another_query_is_another_run(
        self, server: tuple[str, type[Server]], ppo: Callable[..., Result], prompts: Path
    ) -> None:
        assert ppo(prompts, "-r", server[0] + "?model=a&key=x", "--updates", "1").code == 0
        assert ppo(prompts, "-r", server[0] + "?model=a&key=y", "--updates", "1").code == 0  # up to date
        assert len(server[1].requests) == 1
        assert ppo(prompts, "-r", server[0] + "?model=b&key=x", "--updates", "1").code == 73

    @pytest.mark.parametrize("url", ["http:///x", "http://a:b/x", "http://[::1/x", "http://h/x?key=s3cret y"])
    def test_no_url(self, url: str, ppo: Callable[..., Result], prompts: Path) -> None:
        done = ppo(prompts, "-r", url)
        assert (done.code, "s3cret" in done.stderr) == (2, False), done.stderr
        assert done.error.startswith("--reward http://")


class TestFunction:
    def test_of_a_module_in_this_folder(
        self, ppo: Callable[..., Result], prompts: Path, workdir: Path
    ) -> None:
        """It sees prompts as they were given and completions without special tokens."""
        Path("my_reward_a.py").write_text(
            "def score(prompts, completions):\n"
            "    assert all(p.startswith('Say proverb') for p in prompts), prompts\n"
            "    assert not any('<|' in c for c in completions)\n"
            "    return [c.count('e') for c in completions]\n"
        )
        done = ppo(prompts, "-r", "my_reward_a:score", "--updates", "1")
        assert done.code == 0, done.stderr
        inputs = json.loads(Path("out/artifact.json").read_text())["inputs"]
        assert [i["path"] for i in inputs if i["role"] == "reward"] == ["my_reward_a.py"]

    def test_that_raises(self, ppo: Callable[..., Result], prompts: Path) -> None:
        Path("my_reward_c.py").write_text("def score(prompts, completions): return {}['x']\n")
        done = ppo(prompts, "-r", "my_reward_c:score")
        assert (done.code, done.error) == (65, "--reward my_reward_c:score: raised KeyError: 'x'")

    def test_absent(self, ppo: Callable[..., Result], prompts: Path) -> None:
        Path("my_reward_b.py").write_text("def score(prompts, completions): return []\n")
        for spec, code, says in [
            ("no_such_module:score", 66, "no module 'no_such_module'"),
            ("my_reward_b:scroe", 2, "no function 'scroe' (did you mean 'score'?)"),
            ("builtin:lenght", 2, "did you mean 'length'?"),
            ("builtin:length:short", 2, "'short' is no number"),
            ("nosuch/folder/rm", 66, "nosuch/folder/rm"),
        ]:
            done = ppo(prompts, "-r", spec)
            assert (done.code, says in done.error) == (code, True), done.stderr


class TestRewardModel:
    def test_row_1_it_reads_prompt_and_response(self, tiny_model: Path, tmp_path: Path) -> None:
        model = reward_model_of(build_reward_model(tmp_path / "rm", tiny_model), tiny_model)
        (episode,) = episodes_of([(5, 4)])
        (other,) = episodes_of([(5, 4)], seed=1)
        same_answer = Episode(other.prompt, episode.response_ids, False, "")
        assert model([episode]) == model.scores([[*episode.prompt.ids, *episode.response_ids]]).tolist()
        assert model([episode]) != model([same_answer])

    def test_row_5_score_is_read_at_eos_whatever_the_padding(self, tiny_model: Path, tmp_path: Path) -> None:
        """As the saved model itself scores the text with EOS at its end, alone, in transformers."""
        folder = build_reward_model(tmp_path / "rm", tiny_model)
        model = reward_model_of(folder, tiny_model)
        theirs = AutoModelForSequenceClassification.from_pretrained(folder)
        episodes = episodes_of([(5, 4), (2, 20), (9, 1)])
        closed = [Episode(e.prompt, (*e.response_ids, model.eos_id), True, "") for e in episodes]
        for asked in (episodes, closed):  # a response without EOS is read as one with it
            for found, episode in zip(model(asked), episodes, strict=True):
                ids = torch.tensor([[*episode.prompt.ids, *episode.response_ids, model.eos_id]])
                with torch.no_grad():
                    wanted = theirs(ids).logits[0, 0].item()
                assert found == pytest.approx(wanted, abs=1e-6)

    def test_row_8_normalisation_of_the_artifact(self, tiny_model: Path, tmp_path: Path) -> None:
        plain = reward_model_of(build_reward_model(tmp_path / "plain", tiny_model), tiny_model)
        scaled = build_reward_model(tmp_path / "scaled", tiny_model, mean=0.25, std=4.0)
        episodes = episodes_of([(5, 4), (3, 3)])
        wanted = [(s - 0.25) / 4 for s in plain(episodes)]
        assert reward_model_of(scaled, tiny_model)(episodes) == pytest.approx(wanted)

    def test_row_8_a_normalisation_that_cannot_be(self, tiny_model: Path, tmp_path: Path) -> None:
        folder = build_reward_model(tmp_path / "rm", tiny_model, std=0.0)
        with pytest.raises(ToolError, match=r"reward_normalisation has mean 0.0 and std 0.0"):
            reward_model_of(folder, tiny_model)

    def test_an_adapter_of_one(self, tiny_model: Path, tmp_path: Path) -> None:
        """As rm-train leaves it with a PEFT method: an adapter with its head over the policy's base."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
        tuned = get_peft_model(
            base, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
        )
        tuned.save_pretrained(tmp_path / "rm")
        load_tokenizer(str(tiny_model)).save_pretrained(tmp_path / "rm")
        (episode,) = episodes_of([(5, 4)])
        model = reward_model_of(tmp_path / "rm", tiny_model)
        ids = torch.tensor([[*episode.prompt.ids, *episode.response_ids, model.eos_id]])
        with torch.no_grad():
            wanted = tuned.eval()(ids).logits[0, 0].item()
        assert model([episode])[0] == pytest.approx(wanted, abs=1e-6)

    @pytest.mark.parametrize("method", ["lora", "full"])
    def test_trains(
        self, method: str, ppo: Callable[..., Result], prompts: Path, heldout: Path, tiny_model: Path
    ) -> None:
        folder = build_reward_model(Path("rm"), tiny_model)
        done = ppo(prompts, "-r", folder, "--method", method, "--heldout", heldout, "--save-value")
        assert done.code == 0, done.stderr
        log = log_of(Path("out"))
        assert all(line["first_ratio_deviation"] == 0.0 for line in log)
        from safetensors.torch import load_file

        assert any("head" in name for name in load_file("out/value.safetensors"))

    def test_for_another_tokenizer(self, ppo: Callable[..., Result], prompts: Path, tiny_model: Path) -> None:
        folder = build_reward_model(Path("rm"), tiny_model)
        word_tokenizer().save_pretrained(folder)
        done = ppo(prompts, "-r", folder)
        assert done.code == 65
        assert "rm: a reward model for another tokenizer: '<|unk|>' is 0 for the policy" in done.error

    def test_that_is_none(self, ppo: Callable[..., Result], prompts: Path, tiny_model: Path) -> None:
        done = ppo(prompts, "-r", build_reward_model(Path("rm"), tiny_model, num_labels=3))
        assert (done.code, "with 3 labels, not one" in done.error) == (65, True)
        (build_tiny_model(Path("other"))).joinpath("config.json").write_text("{}")
        done = ppo(prompts, "-r", "other")
        assert (done.code, "other: " in done.error) == (65, True)
