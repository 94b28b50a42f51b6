"""One model that answers conversations: in the user's language, with that language's adapter, guarded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.guarding import Masker, StreamingGuard, Verdict, load_guard
from tuneutils.shared.languages import detect, knows, name_of
from tuneutils.shared.models import Loaded, load_adapter, load_model, resolve
from tuneutils.shared.sample import Sampling, generate
from tuneutils.shared.supervise import prompt_ids
from tuneutils.tools.chat.params import Params
from tuneutils.tools.chat.streaming import TextStream

Message = dict[str, Any]
#: Called with each piece of a reply; a true result ends it.
OnText = Callable[[str], object]
#: Below this probability a text's language is not switched to.
SURE = 0.6
DEFAULT = "default"


class TooLong(ToolError):
    """A conversation that leaves no room for a reply."""

    def __init__(self, tokens: int, context: int) -> None:
        super().__init__(f"the conversation has {tokens} tokens; the model's context takes {context}")


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        finish_reason: ``stop``, ``length``, ``content_filter`` (by the guard) or ``cancelled``.
        language: the language replied in, where one was chosen.
        verdict: the guard's, with a guard.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    language: str | None = None
    verdict: Verdict | None = None


class Assistant:
    """A loaded model with its adapters and guard; one conversation at a time."""

    def __init__(self, run: Run[Params], given: str) -> None:
        self.params = run.params
        self.log = run.log
        self.name = given
        _check(run.params, given)
        self.loaded: Loaded = load_model(given, device=run.device, dtype=run.dtype)
        if not self.loaded.tokenizer.chat_template:
            raise ToolError(f"{given}: its tokenizer has no chat template; tune it on conversations first")
        self.guard = load_guard(run.params.guard, model=given) if run.params.guard else None
        self.adapters = self._load_adapters()
        self.languages = _languages(self.adapters)

    def _load_adapters(self) -> dict[str, str]:
        """Language → name of its adapter in the model; ``default`` for all others."""
        made = {}
        for text in self.params.adapter:
            language, folder = split_adapter(text)
            check_base(folder, self.loaded)
            name = f"adapter-{language}"
            if not hasattr(self.loaded.model, "peft_config"):
                self.loaded.model = load_adapter(self.loaded.model, folder, name).eval()
            else:
                _add_adapter(self.loaded.model, folder, name)
            made[language] = name
        return made

    def change(self, **options: Any) -> None:
        """Go on with other options."""
        self.params = dataclasses.replace(self.params, **options)

    @property
    def context(self) -> int:
        """Tokens that the model takes."""
        config = self.loaded.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 1 << 30)

    def language_of(self, messages: Sequence[Message]) -> str | None:
        """The language to reply in: that of the user's last message which tells it, or the one chosen."""
        if self.params.language != "auto":
            return None if self.params.language == "off" else self.params.language
        for message in reversed(messages):
            if message["role"] == "user":
                found, probability = detect(message["content"], self.languages)
                if found is not None and probability >= SURE:
                    return found
        return None

    def prompt(self, messages: Sequence[Message], language: str | None) -> list[int]:
        """Token ids up to where the reply begins.

        Raises:
            TooLong: no room is left.
            ToolError: the chat template refuses the conversation.
        """
        try:
            ids = prompt_ids({"messages": self._with_system(messages, language)}, self.loaded.tokenizer)
        except ValueError as exc:
            raise ToolError(str(exc)) from exc
        if len(ids) >= self.context:
            raise TooLong(len(ids), self.context)
        return ids

    def _with_system(self, messages: Sequence[Message], language: str | None) -> list[Message]:
        made = list(messages)
        system = self.params.system
        note = language and self.params.language_note and language not in self.adapters
        if made and made[0]["role"] == "system":
            system, made = made[0]["content"], made[1:]
        if note and not (language == "en" and system is None and self.params.language == "auto"):
            system = " ".join(filter(None, (system, f"Reply in {name_of(str(language))}.")))
        return [{"role": "system", "content": system}, *made] if system else made

    def reply(
        self, messages: Sequence[Message], on_text: OnText, sampling: Sampling, stop: Sequence[str] = ()
    ) -> Reply:
        """Answer a conversation that ends with the user's turn."""
        language = self.language_of(messages)
        ids = self.prompt(messages, language)
        cancelled = False

        def emit(piece: str) -> None:
            nonlocal cancelled
            cancelled = bool(on_text(piece)) or cancelled

        masker = Masker() if self.params.mask_personal else None
        stream = TextStream(self.loaded.tokenizer, emit, stop, masker)

        def on_token(_index: int, token: int) -> bool:
            return (token not in ends and stream.token(token)) or cancelled

        ends = frozenset(sampling.stop_token_ids)
        asked = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
        verdict = None
        with self.speaking(language):
            if self.guard is None:
                made = generate(self.loaded.model, [ids], sampling, on_token=on_token)[0]
            else:
                with StreamingGuard(self.guard, self.loaded, [asked], on_token) as watching:
                    made = generate(self.loaded.model, [ids], sampling, on_token=watching)[0]
                verdict = watching.verdicts()[0]
        if verdict is not None and verdict.flagged:
            reason = "content_filter"
        elif cancelled:
            reason = "cancelled"
        else:
            reason = "length" if made.finish_reason == "length" else "stop"
            stream.finish()
        count = len(made.token_ids)
        return Reply(stream.text, reason, len(ids), count, language, verdict)

    @contextmanager
    def speaking(self, language: str | None) -> Iterator[None]:
        """With the adapter of a language, the default one, or none."""
        name = self.adapters.get(str(language), self.adapters.get(DEFAULT))
        if not self.adapters:
            yield
        elif name is None:
            with self.loaded.model.disable_adapter():
                yield
        else:
            self.loaded.model.set_adapter(name)
            yield

    def sampling(self, seed: int, **changed: Any) -> Sampling:
        """How replies are drawn, by the options."""
        params = self.params
        chosen = {
            "max_new_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            **{name: value for name, value in changed.items() if value is not None},
        }
        return Sampling(stop_token_ids=end_ids(self.loaded), seed=seed, **chosen)


def _add_adapter(model: Any, folder: str, name: str) -> None:
    """Raises ToolError for an adapter that cannot stand beside the first one."""
    try:
        model.load_adapter(folder, adapter_name=name)
    except (RuntimeError, ValueError, KeyError, TypeError) as exc:
        reason = " ".join(str(exc).split())[:200]
        raise ToolError(f"--adapter {folder}: does not go with the first adapter: {reason}") from exc


def end_ids(loaded: Loaded) -> list[int]:
    """Tokens that end a reply: the tokenizer's EOS, and those of the model's generation settings."""
    config = getattr(loaded.model, "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    listed = more if isinstance(more, list) else [more]
    return sorted({int(i) for i in [loaded.tokenizer.eos_token_id, *listed] if i is not None})


def split_adapter(text: str) -> tuple[str, str]:
    """``sw=FOLDER`` → (sw, FOLDER); a folder alone is the default one."""
    language, sign, folder = text.partition("=")
    return (language, folder) if sign and not Path(text).exists() else (DEFAULT, text)


def check_base(folder: str, loaded: Loaded) -> None:
    """Refuse what is no adapter, or one of another base.

    Raises:
        ToolError: 65.
    """
    ref = resolve(folder)
    if ref.kind != "adapter":
        raise ToolError(f"--adapter {folder}: no adapter but a {ref.kind}; give it as MODEL")
    own, other = loaded.ref.root, ref.root
    recorded = next((i for i in ref.manifest.get("inputs", []) if i["role"] == "model"), None)
    if recorded is not None and Path(own.path).exists():
        from tuneutils.shared.artifact import describe_input

        if describe_input("model", own.given).sha256 != recorded["sha256"]:
            raise ToolError(f"--adapter {folder}: made for {other.given}, not for {own.given}")


def _check(params: Params, given: str) -> None:
    """Raises ToolError (2) for options that do not go together."""
    names = [split_adapter(text)[0] for text in params.adapter]
    double = {n for n in names if names.count(n) > 1}
    if double:
        raise ToolError(f"--adapter: two for {', '.join(sorted(double))}", code=ExitCode.USAGE)
    if params.adapter and resolve(given).kind == "adapter":
        raise ToolError(
            f"{given}: an adapter already; give its base as MODEL and it with --adapter", code=ExitCode.USAGE
        )
    for code in {params.language, *names} - {"auto", "off", DEFAULT}:
        if not knows(code) and params.language == "auto":
            raise ToolError(
                f"--adapter {code}=...: no language that can be told from a text; name it by "
                "its ISO 639-1 code, or choose it with --language",
                code=ExitCode.USAGE,
            )


def _languages(adapters: dict[str, str]) -> frozenset[str]:
    """The languages that a message may be in: those with adapters and English; all, if there are none."""
    own = set(adapters) - {DEFAULT}
    return frozenset(own | {"en"}) if own and DEFAULT not in adapters else frozenset()
