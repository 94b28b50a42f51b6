"""llama.cpp by ctypes: ``python -m tuneutils.shared.engines.llama_cpp MODEL.gguf`` serves the protocol.

``python -m tuneutils.shared.engines.llama_cpp quantize IN OUT FTYPE`` quantizes. Structs are those of
``include/llama.h`` 0.5.0. Never import this beside torch: both bring thread pools and AMX state.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from tuneutils.shared.device import usable_cpus
from tuneutils.shared.engines.protocol import Logits, private_stdout, serve
from tuneutils.shared.engines.runtimes import LLAMA_CPP_VERSION, find_llama_cpp
from tuneutils.shared.errors import ToolError

BATCH = 512
FLASH_ATTN_AUTO = -1

#: Names of ``enum llama_ftype``, as llama-quantize spells them in lower case with dashes.
FTYPES = {
    "f32": 0, "f16": 1, "bf16": 32, "q4-0": 2, "q4-1": 3, "q5-0": 8, "q5-1": 9, "q8-0": 7,
    "q2-k": 10, "q3-k-s": 11, "q3-k-m": 12, "q3-k-l": 13, "q4-k-s": 14, "q4-k-m": 15,
    "q5-k-s": 16, "q5-k-m": 17, "q6-k": 18, "iq4-nl": 25, "iq4-xs": 30, "iq3-s": 26, "iq3-m": 27,
    "tq1-0": 36, "tq2-0": 37,
}  # fmt: skip


def _struct(name: str, fields: str) -> type[ctypes.Structure]:
    """A struct from ``name:type`` pairs: i int32, u uint32, f float, p pointer, b bool, z size_t."""
    types = {"i": c_int32, "u": c_uint32, "f": c_float, "p": c_void_p, "b": c_bool, "z": c_size_t}
    pairs = [field.split(":") for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [(n, types[t]) for n, t in pairs]})


ModelParams = _struct(
    "ModelParams",
    "devices:p tensor_buft_overrides:p n_gpu_layers:i split_mode:i load_mode:i lazy_mode:i main_gpu:i "
    "tensor_split:p progress_callback:p progress_data:p kv_overrides:p "
    "vocab_only:b check_tensors:b use_extra_bufts:b no_host:b no_alloc:b load_mtp:b",
)
ContextParams = _struct(
    "ContextParams",
    "n_ctx:u n_batch:u n_ubatch:u n_seq_max:u n_rs_seq:u n_outputs_max:u n_outputs_max_per_seq:u "
    "n_threads:i n_threads_batch:i ctx_type:i rope_scaling_type:i pooling_type:i attention_type:i "
    "flash_attn_type:i rope_freq_base:f rope_freq_scale:f yarn_ext_factor:f yarn_attn_factor:f "
    "yarn_beta_fast:f yarn_beta_slow:f yarn_orig_ctx:u defrag_thold:f cb_eval:p cb_eval_data:p type_k:i "
    "type_v:i abort_callback:p abort_data:p embeddings:b offload_kqv:b no_perf:b op_offload:b swa_full:b "
    "kv_unified:b samplers:p n_samplers:z ctx_other:p",
)
QuantizeParams = _struct(
    "QuantizeParams",
    "nthread:i ftype:i output_tensor_type:i token_embedding_type:i allow_requantize:b "
    "quantize_output_tensor:b only_copy:b pure:b keep_split:b dry_run:b imatrix:p kv_overrides:p "
    "tt_overrides:p prune_layers:p max_buf_size:z",
)
SIZES = {ModelParams: 80, ContextParams: 160, QuantizeParams: 64}


class Batch(ctypes.Structure):
    """``struct llama_batch``."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


#: function → (result, arguments)
PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_version": (c_char_p, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_quantize_default_params": (QuantizeParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_model_quantize": (c_uint32, [c_char_p, c_char_p, POINTER(QuantizeParams)]),
}


def load_library(folder: Path) -> Any:
    """llama.cpp's library with its prototypes set and its CPU backend loaded."""
    for struct, size in SIZES.items():
        assert ctypes.sizeof(struct) == size, (struct, ctypes.sizeof(struct))
    library = ctypes.CDLL(str(next(folder.glob("libllama.*"))))
    ggml = ctypes.CDLL(str(next(p for p in folder.glob("libggml.*"))))
    for name, (result, arguments) in PROTOTYPES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_quiet_callback(), None)
    ggml.ggml_backend_load_all_from_path(os.fsencode(folder))
    library.llama_backend_init()
    return library


_LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
_ERROR = 4


@_LOG  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, _data: int) -> None:
    if level >= _ERROR and level < 5:
        sys.stderr.write(text.decode("utf-8", "replace"))


def _quiet_callback() -> c_void_p:
    return ctypes.cast(_log, c_void_p)


class LlamaCpp:
    """A GGUF file loaded by llama.cpp."""

    def __init__(self, path: str) -> None:
        self._lib = load_library(find_llama_cpp())
        self._threads = int(os.environ.get("OMP_NUM_THREADS") or usable_cpus())
        self._model = self._lib.llama_model_load_from_file(
            os.fsencode(path), self._lib.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"{path}: llama.cpp cannot load it")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.vocabulary: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self._context: int | None = None
        self._shape = (0, 0)
        self._batch = self._lib.llama_batch_init(BATCH, 0, 1)
        self._length = 0
        self.begin(1, BATCH)

    def describe(self) -> dict[str, Any]:
        return {"engine": "llama.cpp", "version": LLAMA_CPP_VERSION, "threads": self._threads}

    def tokenize(self, text: str, special: bool) -> list[int]:
        data = text.encode("utf-8", "surrogatepass")
        room = (c_int32 * (len(data) + 16))()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), room, len(room), False, special)
        return list(room[:count])

    def begin(self, batch: int, length: int) -> None:
        if self._shape[0] != batch or self._shape[1] < length:
            if self._context:
                self._lib.llama_free(self._context)
            wanted = self._lib.llama_context_default_params()
            wanted.n_ctx = -(-length // 256) * 256 * batch
            wanted.n_batch = wanted.n_ubatch = BATCH
            wanted.n_seq_max = batch
            wanted.n_outputs_max = wanted.n_outputs_max_per_seq = 0
            wanted.n_threads = wanted.n_threads_batch = self._threads
            self._context = self._lib.llama_init_from_model(self._model, wanted)
            if not self._context:
                raise RuntimeError(f"llama.cpp has no room for {batch} × {length} tokens")
            self._shape = batch, length
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._length = 0

    def logits(self, ids: Sequence[int]) -> Logits:
        self.begin(1, len(ids))
        out = np.empty((len(ids), self.vocabulary), np.float32)
        for start in range(0, len(ids), BATCH):
            piece = ids[start : start + BATCH]
            self._decode([(0, start + i, token, True) for i, token in enumerate(piece)])
            pointer = self._lib.llama_get_logits(self._context)
            out[start : start + len(piece)] = np.ctypeslib.as_array(pointer, (len(piece), self.vocabulary))
        return out

    def feed(self, rows: Sequence[Sequence[int]]) -> list[int]:
        width = len(rows[0])
        made: list[int] = []
        cells = [
            (row, self._length + i, token, i == width - 1)
            for row, tokens in enumerate(rows)
            for i, token in enumerate(tokens)
        ]
        for start in range(0, len(cells), BATCH):
            piece = cells[start : start + BATCH]
            self._decode(piece)
            for i, cell in enumerate(piece):
                if cell[3]:
                    pointer = self._lib.llama_get_logits_ith(self._context, i)
                    made.append(int(np.ctypeslib.as_array(pointer, (self.vocabulary,)).argmax()))
        self._length += width
        return made

    def _decode(self, cells: Sequence[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(cells)
        for i, (row, position, token, wanted) in enumerate(cells):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        if code := self._lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed with {code}")


def quantize(source: str, target: str, ftype: str, *, pure: bool = False) -> None:
    """Write ``target`` in the given type, by llama.cpp's own rules of which tensor gets which.

    Args:
        ftype: a key of ``FTYPES``.
        pure: the type for all matrices, without those rules.
    """
    library = load_library(find_llama_cpp())
    params = library.llama_model_quantize_default_params()
    params.ftype = FTYPES[ftype]
    params.nthread = int(os.environ.get("OMP_NUM_THREADS") or usable_cpus())
    params.pure = pure
    if code := library.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)):
        raise RuntimeError(f"{source}: llama_model_quantize failed with {code}")


def main(arguments: Sequence[str]) -> int:
    out = private_stdout()
    try:
        if arguments[0] == "quantize":
            quantize(arguments[1], arguments[2], arguments[3], pure="pure" in arguments[4:])
            return 0
        started = time.perf_counter()
        engine = LlamaCpp(arguments[0])
        serve(engine, time.perf_counter() - started, out)
    except ToolError as exc:
        print(exc, file=sys.stderr)
        return exc.code
    except RuntimeError as exc:
        print(exc, file=sys.stderr)
        return 65
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
