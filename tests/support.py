"""What tests share besides fixtures: a tiny model, small record streams, and tools run both ways."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Audit events of a write to the file system, besides opening a file for it.
WRITES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
ROOT = Path(__file__).resolve().parent.parent
PROVERBS = [
    "A bird in the hand is worth two in the bush.",
    "The early bird catches the worm.",
    "Still waters run deep, and rivers find the sea.",
    "Many hands make light work; too many cooks spoil the broth.",
    "What goes up must come down, said the apple to the tree.",
    "Ten green bottles hang on the wall: 10, 9, 8, 7, 6, 5, 4, 3, 2, 1.",
    "Größe, naïveté and 東京 are written with more than one byte a letter.",
    "Measure twice and cut once.",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 384 entries with distinct bos, eos, pad and unk and a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|unk|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE(unk_token="<|unk|>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(PROVERBS * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        model_max_length=128,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def build_tiny_model(folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """Save a random Llama of two layers with its tokenizer; ``config`` overrides LlamaConfig's fields."""
    from tuneutils.shared import device  # noqa: F401, I001 - sets the thread policy before torch
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**fields, **config}))
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_records(format: str, count: int = 8) -> list[dict[str, Any]]:  # noqa: A002 - the records' own word
    """``count`` records of one format, all different."""
    made = []
    for i in range(count):
        text = f"{i}. {PROVERBS[i % len(PROVERBS)]}"
        question, answer = f"Say proverb {i}.", text
        user = {"role": "user", "content": question}
        made.append(
            {
                "text": {"text": text},
                "prompt": {"prompt": question},
                "prompt-completion": {"prompt": question, "completion": " " + answer},
                "messages": {"messages": [user, {"role": "assistant", "content": answer}]},
                "preference": {"prompt": question, "chosen": answer, "rejected": f"I do not know {i}."},
                "implicit-preference": {"chosen": question + answer, "rejected": question + "No."},
                "unpaired": {"prompt": question, "completion": answer, "label": i % 2 == 0},
                "parallel": {"src": text, "tgt": text[::-1], "src_lang": "en", "tgt_lang": "xx"},
            }[format]
        )
    return made


def write_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Plain JSONL, written without the code under test."""
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Result:
    """What a tool left: exit code and both streams."""

    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one error line; fails when there is none, or a traceback."""
        lines = [line for line in self.stderr.splitlines() if ": error: " in line]
        assert len(lines) == 1, self.stderr
        assert "Traceback" not in self.stderr
        return lines[0].split(": error: ", 1)[1]

    def json(self) -> Any:
        return json.loads(self.stdout)


def run_cli(
    *args: str | os.PathLike[str],
    stdin: bytes | str | None = None,
    env: Mapping[str, str | None] | None = None,
    cwd: Path | None = None,
    timeout: float = 300,
    **popen: Any,
) -> Result:
    """Run ``python ARGS`` (a script, or ``-m module``) in a process of its own.

    Without ``stdin`` the standard input is empty. ``env`` adds to the environment; None removes.
    """
    given = stdin.encode() if isinstance(stdin, str) else stdin or b""
    done = subprocess.run(
        [sys.executable, *map(os.fspath, args)],
        input=given,
        capture_output=True,
        env=environment(env),
        cwd=cwd,
        timeout=timeout,
        check=False,
        **popen,
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


def environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's environment without tuneutils' own variables, with ``changes``."""
    env: dict[str, str | None] = {k: v for k, v in os.environ.items() if not k.startswith("TUNEUTILS_")}
    env.update(changes or {})
    return {k: v for k, v in env.items() if v is not None}


def tool_args(tool: str) -> list[str]:
    """The arguments to Python that run one of our tools, installed or not."""
    return ["-m", f"tuneutils.tools.{tool.replace('-', '_')}.cli"]


def invoke(
    command: Any,
    *args: str | os.PathLike[str],
    stdin: bytes | str | None = None,
    env: Mapping[str, str | None] | None = None,
) -> Result:
    """Run a tool's command in this process: much faster, but without signals and memory of its own."""
    import logging

    from click.testing import CliRunner

    logger = logging.getLogger("tuneutils")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        done = CliRunner(env=dict(env or {})).invoke(command, [os.fspath(a) for a in args], input=stdin)
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Result(done.exit_code, done.stdout, done.stderr)


def load_tool(tool: str) -> Any:
    """The Click command of one of our tools."""
    import importlib

    return importlib.import_module(f"tuneutils.tools.{tool.replace('-', '_')}.cli").main


def fork(call: Callable[[], int], stdout: int | None = None, stderr: int | None = None) -> int:
    """Run ``call`` in a fork of this process, which ends with its exit code; gives the process's number.

    Without file descriptors both streams go nowhere.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)
        os.dup2(nowhere if stdout is None else stdout, 1)
        os.dup2(nowhere if stderr is None else stderr, 2)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, m) for n, m in ((0, "r"), (1, "w"), (2, "w")))
        code = call()
        sys.stdout.flush()
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def forked(call: Callable[[], Result], kill_at: int | None = None) -> tuple[int, int]:
    """Run ``call`` in a fork of this process; gives how it ended and how often it wrote to the file system.

    With ``kill_at`` the process is ended by SIGKILL before that write from Python (an open for writing, a
    rename, …), so that every state of the disk in between can be reached. Far cheaper than a process from a
    shell, whose imports take seconds; it needs one OpenMP thread.
    """
    import signal

    count_file = Path("count").absolute()

    def counted() -> int:
        count = 0

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            opens = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            if opens or event in WRITES:
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        done = call()
        sys.stderr.write(done.stderr)
        written = count
        count_file.write_text(str(written))
        return done.code

    _, status = os.waitpid(fork(counted, stdout=1, stderr=2), 0)
    return os.waitstatus_to_exitcode(status), int(count_file.read_text()) if count_file.exists() else 0
