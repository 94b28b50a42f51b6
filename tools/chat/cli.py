"""``chat``: talk to a model in a terminal, from a script, or over the OpenAI protocol."""

from __future__ import annotations

from tuneutils.shared.command import Run, Summary, tool
from tuneutils.tools.chat.params import Params


@tool("chat", Params, group="evaluate", inputs="MODEL", many=False, stdin=False)
def main(run: Run[Params]) -> Summary | None:
    """Talk to MODEL: a folder, an adapter, a GGUF file or a Hub id.

    In a terminal it is a conversation (/help lists its commands). With a text on stdin it writes one reply
    to stdout. With --serve it answers the OpenAI chat-completions protocol, so that existing clients work.
    """
    from tuneutils.tools.chat.talk import talk

    return talk(run)


if __name__ == "__main__":
    main()
