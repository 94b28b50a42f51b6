"""Python that loads an artifact; the tests run it."""

from __future__ import annotations

import json

from tuneutils.tools.model_card.facts import HUB, Facts, Node


def loading_code(facts: Facts) -> str:
    path = json.dumps(facts.path, ensure_ascii=False)
    node = facts.base()
    if facts.kind == "adapter" and node is not None:
        return _load_adapter(facts, node)
    if facts.kind == "model" and (facts.root / "config.json").is_file():
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({path})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({path})\n" + GENERATE
        )
    if facts.kind == "records":
        return (
            "from tuneutils.shared.records import Reader\n\n"
            f"records = list(Reader([{path}]))\nprint(len(records))"
        )
    name = "report.json" if (facts.root / "report.json").is_file() else "artifact.json"
    file = json.dumps(f"{facts.path}/{name}", ensure_ascii=False)
    return (
        f'import json\n\nwith open({file}, encoding="utf-8") as stream:\n'
        "    found = json.load(stream)\nprint(sorted(found))"
    )


GENERATE = (
    '\ninputs = tokenizer("Hello", return_tensors="pt")\n'
    "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"
)


def _load_adapter(facts: Facts, node: Node) -> str:
    path = json.dumps(facts.path, ensure_ascii=False)
    found = HUB.match(node.source) if node.state == "remote" else None
    where = json.dumps(found["id"] if found else node.given.path, ensure_ascii=False)
    at = f", revision={json.dumps(found['revision'])}" if found and found["revision"] else ""
    config_path = facts.root / "adapter_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    own = config.get("peft_type") in ("BOTTLENECK", "FUSION")
    first = "import tuneutils.shared.adapters  # makes our adapters known to PEFT\n" if own else ""
    tokenizer = path if (facts.root / "tokenizer_config.json").is_file() else where + at
    return (
        f"{first}from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({where}{at})\n"
        f"model = PeftModel.from_pretrained(base, {path})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})\n" + GENERATE
    )
