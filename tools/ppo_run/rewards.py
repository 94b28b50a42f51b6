"""Where rewards come from: a reward model, a Python function, an HTTP endpoint, or one that is built in.

A text reward is a function ``fn(prompts: list[str], completions: list[str]) -> list[float]``. An HTTP
endpoint is sent ``{"prompts": […], "completions": […]}`` and answers ``{"rewards": […]}``.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tuneutils.shared.artifact import Input, describe_input
from tuneutils.shared.errors import ExitCode, ToolError, nearest
from tuneutils.shared.manifest import without_secrets
from tuneutils.shared.models import model_input
from tuneutils.tools.ppo_run.prompts import Prompt

TextFunction = Callable[[list[str], list[str]], Sequence[float]]
MAX_REPLY_BYTES = 64 << 20
TOKEN = "TUNEUTILS_REWARD_TOKEN"
POSITIVE = frozenset(
    (
        "good",
        "great",
        "love",
        "lovely",
        "happy",
        "best",
        "wonderful",
        "excellent",
        "nice",
        "beautiful",
        "joy",
        "fun",
    )
)
NEGATIVE = frozenset(
    ("bad", "awful", "hate", "sad", "worst", "terrible", "poor", "ugly", "boring", "wrong", "pain", "fear")
)


@dataclass(frozen=True)
class Episode:
    """A prompt and what the policy answered.

    Attributes:
        response_ids: the tokens drawn, up to the first stop token, which is included.
        finished: whether a stop token ended it.
        completion: the response's text without special tokens.
    """

    prompt: Prompt
    response_ids: tuple[int, ...]
    finished: bool
    completion: str


class Reward(Protocol):
    """Scores of episodes, one number each."""

    def __call__(self, episodes: Sequence[Episode]) -> list[float]: ...


def kind_of(spec: str) -> str:
    """``builtin``, ``http``, ``function`` or ``model``: what ``--reward`` names."""
    if spec.startswith("builtin:"):
        return "builtin"
    if spec.startswith(("http://", "https://")):
        return "http"
    if not Path(spec).exists() and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec):
        return "function"
    return "model"


def reward_input(spec: str) -> list[Input]:
    """What the manifest says of the reward; a built-in one is a parameter and no input.

    Raises:
        ToolError: it is not there (66), or not usable (2).
    """
    kind = kind_of(spec)
    if kind == "builtin":
        _builtin(spec)
        return []
    if kind == "http":
        _check_url(spec)
        if urllib.parse.urlsplit(spec).username is not None:
            raise ToolError(
                "--reward: a URL with a password would be recorded; put the secret in the environment as "
                f"{TOKEN}, sent as a bearer token",
                code=ExitCode.USAGE,
            )
        return [Input("reward", without_secrets(spec), "")]
    if kind == "function":
        _function(spec)
        source = getattr(sys.modules[spec.partition(":")[0]], "__file__", None)
        return [describe_input("reward", source)] if source else []
    return [model_input(spec, "reward")]


@dataclass
class TextReward:
    """A function of texts as a reward of episodes; what a user's function raises is reported as its own.

    Raises:
        ToolError: exit 65.
    """

    function: TextFunction
    name: str = "the reward"

    def __call__(self, episodes: Sequence[Episode]) -> list[float]:
        prompts = [e.prompt.text for e in episodes]
        try:
            scores = self.function(prompts, [e.completion for e in episodes])
        except (ToolError, MemoryError):
            raise
        except (Exception, SystemExit) as exc:
            raise ToolError(f"--reward {self.name}: raised {type(exc).__name__}: {exc}") from exc
        return checked(episodes, scores)


def text_reward(spec: str, *, timeout_s: float = 30.0, retries: int = 3) -> TextReward:
    """The reward of any ``--reward`` but a model."""
    kind = kind_of(spec)
    if kind == "builtin":
        return TextReward(_builtin(spec), spec)
    function = Endpoint(spec, timeout_s, retries) if kind == "http" else _function(spec)
    return TextReward(function, without_secrets(spec))


def _check_url(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        wrong = "its port is 0" if parts.port == 0 else "" if parts.hostname else "has no host"
    except ValueError as exc:
        wrong = str(exc)
    if not url.isascii() or not url.isprintable() or " " in url:
        wrong = "percent-encode the characters that a URL cannot hold"
    if wrong:
        raise ToolError(f"--reward {without_secrets(url)}: {wrong}", code=ExitCode.USAGE)


def checked(episodes: Sequence[Episode], scores: Any) -> list[float]:
    """Scores as floats.

    Raises:
        ToolError: exit 65 when they are not as many finite numbers as there are episodes.
    """
    try:
        made = [float(score) for score in scores]
    except (TypeError, ValueError) as exc:
        raise ToolError(f"the reward must give a list of numbers: {exc}") from exc
    if len(made) != len(episodes):
        raise ToolError(f"the reward gave {len(made)} scores for {len(episodes)} completions")
    for episode, score in zip(episodes, made, strict=True):
        if not math.isfinite(score):
            raise ToolError(
                f"{episode.prompt.place}: the reward is {score} for the prompt {_short(episode.prompt.text)} "
                f"and the completion {_short(episode.completion)}; make the reward finite there"
            )
    return made


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:'\w+)?", text.lower())


def length(target: float | None) -> TextFunction:
    """The number of words; with a target ``n``, ``-|words - n| / n``."""

    def score(_prompts: list[str], completions: list[str]) -> list[float]:
        counts = [len(words_of(c)) for c in completions]
        return [float(n) if target is None else -abs(n - target) / target for n in counts]

    return score


def sentiment(_number: float | None) -> TextFunction:
    """``(p - n) / (p + n + 1)`` for ``p`` words of praise and ``n`` of blame out of two short lists."""

    def score(_prompts: list[str], completions: list[str]) -> list[float]:
        made = []
        for completion in completions:
            words = words_of(completion)
            good, bad = sum(w in POSITIVE for w in words), sum(w in NEGATIVE for w in words)
            made.append((good - bad) / (good + bad + 1))
        return made

    return score


BUILTIN: dict[str, Callable[[float | None], TextFunction]] = {"length": length, "sentiment": sentiment}


def _builtin(spec: str) -> TextFunction:
    _, name, *rest = spec.split(":")
    if name not in BUILTIN:
        raise ToolError(
            f"--reward {spec}: no such reward{nearest(name, BUILTIN)}; there are {', '.join(BUILTIN)}",
            code=ExitCode.USAGE,
        )
    text = ":".join(rest)
    try:
        number = float(text) if rest else None
    except ValueError as exc:
        raise ToolError(f"--reward {spec}: {text!r} is no number", code=ExitCode.USAGE) from exc
    if number is not None and not 0 < number < math.inf:
        raise ToolError(f"--reward {spec}: the number must be positive and finite", code=ExitCode.USAGE)
    return BUILTIN[name](number)


def _function(spec: str) -> TextFunction:
    """A function of a module that is installed or lies in the current folder."""
    module_name, _, name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        raise ToolError(
            f"--reward {spec}: no module {exc.name!r} here or installed", code=ExitCode.MISSING_INPUT
        ) from exc
    except (Exception, SystemExit) as exc:
        raise ToolError(f"--reward {spec}: importing it raised {type(exc).__name__}: {exc}") from exc
    function = getattr(module, name, None)
    if not callable(function):
        raise ToolError(
            f"--reward {spec}: {module_name} has no function {name!r}{nearest(name, vars(module))}",
            code=ExitCode.USAGE,
        )
    return function  # type: ignore[no-any-return]


@dataclass
class Endpoint:
    """A reward served over HTTP; a failed try is repeated after 1, 2, 4, … seconds.

    Raises:
        ToolError: no answer after all tries (75), a refusal, or an answer that is no rewards (65).
    """

    url: str
    timeout_s: float
    retries: int
    pause_s: float = 1.0

    @property
    def shown(self) -> str:
        return str(without_secrets(self.url))

    def __call__(self, prompts: list[str], completions: list[str]) -> Sequence[float]:
        body = json.dumps({"prompts": prompts, "completions": completions}).encode()
        for attempt in range(self.retries + 1):
            try:
                return self._post(body)
            except urllib.error.HTTPError as exc:
                reason = f"HTTP {exc.code} {exc.reason}"
                if exc.code < 500 and exc.code != 429:
                    raise ToolError(f"--reward {self.shown}: refused: {reason}") from exc
            except (urllib.error.URLError, TimeoutError, ConnectionError) as exc:
                reason = str(getattr(exc, "reason", None) or exc)
            if attempt < self.retries:
                time.sleep(self.pause_s * 2**attempt)
        raise ToolError(
            f"--reward {self.shown}: no answer in {self.retries + 1} tries of {self.timeout_s:g} s: "
            f"{reason}; start the server and run this again (it goes on from its last checkpoint)",
            code=ExitCode.RETRYABLE,
        )

    def _post(self, body: bytes) -> Sequence[float]:
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get(TOKEN):
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(self.url, body, headers)
        with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
            raw = reply.read(MAX_REPLY_BYTES)
            promised = int(reply.headers.get("Content-Length") or 0)
        if len(raw) < min(promised, MAX_REPLY_BYTES):
            raise ConnectionError(f"the answer broke off after {len(raw)} of {promised} bytes")
        try:
            answer = json.loads(raw)
        except ValueError as exc:
            raise ToolError(f"--reward {self.shown}: the answer is not JSON: {raw[:60]!r}") from exc
        rewards = answer.get("rewards") if isinstance(answer, dict) else answer
        if not isinstance(rewards, list):
            raise ToolError(
                f'--reward {self.shown}: the answer must be {{"rewards": [...]}}, is {raw[:60]!r}'
            )
        return rewards
