"""Answer a prompt with ExecuTorch.

pip install executorch
python example.py "What is the capital of France?"
"""

import json
import sys
from pathlib import Path

import torch
from executorch.runtime import Runtime
from tokenizers import Tokenizer

HERE = Path(__file__).parent


def main(prompt, max_new_tokens=128):
    chat = json.loads((HERE / "chat.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    forward = Runtime.get().load_program(HERE / "model.pte").load_method("forward")
    tokens = tokenizer.encode(chat["before"] + prompt + chat["after"], add_special_tokens=False).ids
    start, read = len(tokens), 0
    while len(tokens) < min(start + max_new_tokens, chat["context"]):
        logits = forward.execute([torch.tensor([tokens[read:]]), torch.arange(read, len(tokens))])[0]
        read = len(tokens)
        token = int(logits[0, -1].argmax())
        if token in chat["stop"]:
            break
        tokens.append(token)
    print(tokenizer.decode(tokens[start:]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
