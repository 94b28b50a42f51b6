"""Answer a prompt with ONNX Runtime GenAI.

pip install onnxruntime-genai
python example.py "What is the capital of France?"
"""

import json
import sys
from pathlib import Path

import onnxruntime_genai as og

HERE = Path(__file__).parent


def main(prompt, max_new_tokens=128):
    chat = json.loads((HERE / "chat.json").read_text(encoding="utf-8"))
    model = og.Model(str(HERE))
    tokenizer = og.Tokenizer(model)
    stream = tokenizer.create_stream()
    tokens = tokenizer.encode(chat["before"] + prompt + chat["after"])
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=min(len(tokens) + max_new_tokens, chat["context"]), do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
        token = int(generator.get_next_tokens()[0])
        if token in chat["stop"]:
            break
        print(stream.decode(token), end="", flush=True)
    print()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
