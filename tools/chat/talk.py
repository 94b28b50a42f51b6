"""What ``chat`` is asked for: a conversation in a terminal, one reply to stdin, or a server."""

from __future__ import annotations

import sys

from tuneutils.shared.command import Run, Summary
from tuneutils.shared.errors import ToolError
from tuneutils.shared.models import resolve
from tuneutils.tools.chat.history import History
from tuneutils.tools.chat.params import Params


def talk(run: Run[Params]) -> Summary | None:
    """Run it."""
    resolve(run.inputs[0])  # a wrong name is told before a message is waited for
    if run.params.serve:
        from tuneutils.tools.chat.serve import check_address, serve

        check_address(run.params)
        return serve(run)
    history = History.open(run.params.history)
    if sys.stdin is not None and sys.stdin.isatty():
        from tuneutils.tools.chat.terminal import converse

        return converse(run, history)
    return once(run, history)


def once(run: Run[Params], history: History) -> Summary:
    """One reply to the text on stdin."""
    data = sys.stdin.buffer.read() if sys.stdin is not None else b""
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError as exc:
        raise ToolError(f"<stdin>: not UTF-8: byte 0x{data[exc.start]:02x} at {exc.start}") from exc
    if not text:
        raise ToolError("<stdin>: empty; pipe a message in, or run it in a terminal")
    from tuneutils.tools.chat.assistant import Assistant

    assistant = Assistant(run, run.inputs[0])
    messages = [*history.messages, {"role": "user", "content": text}]

    def show(piece: str) -> None:
        if not run.json:
            sys.stdout.write(piece)
            sys.stdout.flush()

    reply = assistant.reply(messages, show, assistant.sampling(run.seed))
    said = reply.text
    if reply.finish_reason == "content_filter":
        said = run.params.refusal
        show(("\n" if reply.text else "") + said)
        assert reply.verdict is not None
        run.log.warning("the guard stopped the reply: %s", reply.verdict.category or "flagged")
    show("\n")
    history.add(messages[-1], {"role": "assistant", "content": said})
    if reply.finish_reason == "length":
        run.log.warning("the reply was cut off at %d tokens", reply.completion_tokens)
    return {
        "reply": said,
        "finish_reason": reply.finish_reason,
        "language": reply.language,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        **({"verdict": reply.verdict.as_json()} if reply.verdict else {}),
    }
