"""Answer a prompt with llama.cpp and nothing but Python's standard library.

    npm pack @node-llama-cpp/linux-x64@3.22.1 && tar xzf node-llama-cpp-linux-x64-3.22.1.tgz
    python example.py package/bins/linux-x64 "What is the capital of France?"

The first argument is a folder with llama.cpp's shared libraries. The structs are those of version 0.5.0.
"""

import ctypes
import json
import os
import sys
from ctypes import byref, c_bool, c_char_p, c_int32, c_uint32, c_void_p, create_string_buffer
from pathlib import Path

HERE = Path(__file__).parent


class Params(ctypes.Structure):
    """``struct llama_model_params``, passed on as the library fills it in."""

    _fields_ = [("bytes", ctypes.c_uint64 * 10)]


class ContextParams(ctypes.Structure):
    """``struct llama_context_params``: the first fields are set here, the rest passed on."""

    _fields_ = [("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("rest", c_uint32 * 37)]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32), ("token", c_void_p), ("embd", c_void_p), ("pos", c_void_p),
        ("n_seq_id", c_void_p), ("seq_id", c_void_p), ("logits", c_void_p),
    ]  # fmt: skip


@ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
def silent(level, text, data):
    """Replaces llama.cpp's log."""


def load(folder):
    llama = ctypes.CDLL(str(next(folder.glob("libllama.*"))))
    ctypes.CDLL(str(next(folder.glob("libggml.*")))).ggml_backend_load_all_from_path(os.fsencode(folder))
    for name, result, arguments in (
        ("llama_log_set", None, [c_void_p, c_void_p]),
        ("llama_model_default_params", Params, []),
        ("llama_context_default_params", ContextParams, []),
        ("llama_model_load_from_file", c_void_p, [c_char_p, Params]),
        ("llama_init_from_model", c_void_p, [c_void_p, ContextParams]),
        ("llama_model_get_vocab", c_void_p, [c_void_p]),
        ("llama_tokenize", c_int32, [c_void_p, c_char_p, c_int32, c_void_p, c_int32, c_bool, c_bool]),
        ("llama_token_to_piece", c_int32, [c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool]),
        ("llama_batch_get_one", Batch, [c_void_p, c_int32]),
        ("llama_decode", c_int32, [c_void_p, Batch]),
        ("llama_set_n_threads", None, [c_void_p, c_int32, c_int32]),
        ("llama_sampler_init_greedy", c_void_p, []),
        ("llama_sampler_sample", c_int32, [c_void_p, c_void_p, c_int32]),
    ):
        function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    llama.llama_log_set(ctypes.cast(silent, c_void_p), None)
    return llama


def main(libraries, prompt, max_new_tokens=128):
    chat = json.loads((HERE / "chat.json").read_text(encoding="utf-8"))
    llama = load(Path(libraries).resolve())
    model = llama.llama_model_load_from_file(
        os.fsencode(HERE / "model.gguf"), llama.llama_model_default_params()
    )
    vocab = llama.llama_model_get_vocab(model)
    text = (chat["before"] + prompt + chat["after"]).encode()
    tokens = (c_int32 * (len(text) + 8))()
    count = llama.llama_tokenize(vocab, text, len(text), tokens, len(tokens), False, True)
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch = count + max_new_tokens, count
    context = llama.llama_init_from_model(model, params)
    threads = len(os.sched_getaffinity(0))
    llama.llama_set_n_threads(context, threads, threads)
    greedy = llama.llama_sampler_init_greedy()
    batch = llama.llama_batch_get_one(tokens, count)
    piece = create_string_buffer(256)
    for _ in range(max_new_tokens):
        if llama.llama_decode(context, batch):
            sys.exit("llama_decode failed")
        token = c_int32(llama.llama_sampler_sample(greedy, context, -1))
        if token.value in chat["stop"]:
            break
        size = llama.llama_token_to_piece(vocab, token, piece, len(piece), 0, False)
        sys.stdout.buffer.write(piece.raw[:size])
        sys.stdout.flush()
        batch = llama.llama_batch_get_one(byref(token), 1)
    print()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
