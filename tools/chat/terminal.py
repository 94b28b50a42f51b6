"""A conversation in a terminal."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from tuneutils.shared.command import Run, Summary
from tuneutils.tools.chat.assistant import Assistant, Message, Reply, TooLong
from tuneutils.tools.chat.history import History
from tuneutils.tools.chat.params import Params

HELP = """\
/again          another reply to your last message
/undo           take back your last message and its reply
/reset          begin anew
/system [TEXT]  show or set the system prompt
/lang CODE      reply in this language; auto follows yours
/save FILE      write the conversation as JSONL messages
/exit           leave; so does Ctrl-D. Ctrl-C ends a reply. A line that ends in \\ goes on."""


def converse(run: Run[Params], history: History) -> Summary:
    """Talk until the user leaves."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing

    return Conversation(run, history).run_it()


class Conversation:
    """The loop, its commands and its screen."""

    def __init__(self, run: Run[Params], history: History) -> None:
        self.run, self.history = run, history
        self.assistant = Assistant(run, run.inputs[0])
        self.turns = 0
        self.commands: dict[str, Callable[[str], None]] = {
            "again": self.again,
            "undo": self.undo,
            "reset": self.reset,
            "system": self.system,
            "lang": self.lang,
            "save": self.save,
            "help": lambda _: click.echo(HELP, err=True),
        }

    def run_it(self) -> Summary:
        self.run.log.info("%s on %s; /help lists commands", self.assistant.name, self.assistant.loaded.device)
        while (text := _ask()) is not None:
            if not text.strip():
                continue
            if text.startswith("/"):
                if text.strip() in ("/exit", "/quit"):
                    break
                self.command(text)
            else:
                self.answer(text)
        return {"turns": self.turns, "messages": len(self.history.messages)}

    def command(self, text: str) -> None:
        name, _, rest = text[1:].strip().partition(" ")
        if name not in self.commands:
            click.echo(f"/{name}: no command; /help lists them", err=True)
            return
        self.commands[name](rest.strip())

    def answer(self, text: str) -> None:
        """Reply to a message, and keep both."""
        asked: Message = {"role": "user", "content": text}
        reply = self._reply([*self.history.messages, asked])
        if reply is None:
            return
        self.turns += 1
        said = reply.text
        if reply.finish_reason == "content_filter":
            said = self.run.params.refusal
            kind = reply.verdict.category if reply.verdict else None
            click.secho(f"\n[cut off by the guard{': ' + kind if kind else ''}] {said}", fg="yellow")
        else:
            click.echo()
        if reply.finish_reason == "length":
            self.run.log.warning("cut off at %d tokens (--max-new-tokens)", reply.completion_tokens)
        self.history.add(asked, {"role": "assistant", "content": said})

    def _reply(self, messages: list[Message]) -> Reply | None:
        forgotten = 0
        while True:
            try:
                with _interruptible() as stopping:

                    def show(piece: str) -> bool:
                        sys.stdout.write(piece)
                        sys.stdout.flush()
                        return stopping.is_set()

                    sampling = self.assistant.sampling(self.run.seed + self.turns)
                    return self.assistant.reply(messages, show, sampling)
            except TooLong as exc:
                if len(messages) < 3:
                    click.echo(f"{exc}", err=True)
                    return None
                messages, forgotten = messages[2:], forgotten + 2
                self.run.log.warning("too long a conversation: %d messages left out", forgotten)
            except KeyboardInterrupt:  # a second Ctrl-C, before the next token came
                click.echo("\n[stopped]", err=True)
                return None

    def again(self, _: str) -> None:
        said = self.history.undo()
        if said is None:
            click.echo("nothing to reply to", err=True)
        else:
            self.turns += 1  # another seed
            self.answer(said)

    def undo(self, _: str) -> None:
        said = self.history.undo()
        click.echo("nothing to take back" if said is None else f"taken back: {said[:60]}", err=True)

    def reset(self, _: str) -> None:
        self.history.clear()
        click.echo("forgotten", err=True)

    def system(self, text: str) -> None:
        if text:
            self.assistant.change(system=text)
        click.echo(self.assistant.params.system or "no system prompt", err=True)

    def lang(self, code: str) -> None:
        self.assistant.change(language=code or "auto")
        click.echo(f"replies in: {self.assistant.params.language}", err=True)

    def save(self, path: str) -> None:
        if not path:
            click.echo("/save FILE", err=True)
            return
        try:
            copy = History(Path(path))
            copy.add(*self.history.messages)
        except OSError as exc:
            click.echo(f"{path}: {(exc.strerror or str(exc)).lower()}", err=True)
            return
        click.echo(f"{len(copy.messages)} messages in {path}", err=True)


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Meanwhile the first Ctrl-C sets the event, so that what has been said is kept; a second one raises."""
    stopping = threading.Event()

    def interrupt(*_: object) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGINT, before)


def _ask() -> str | None:
    """The next message; None at the end of input."""
    lines = []
    try:
        line = input("> ")
        while line.endswith("\\"):
            lines.append(line[:-1])
            line = input(". ")
    except EOFError:
        click.echo(err=True)
        return None
    except KeyboardInterrupt:
        click.echo(err=True)
        return ""
    return "\n".join([*lines, line])
