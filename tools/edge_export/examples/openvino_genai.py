"""Answer a prompt with OpenVINO GenAI.

pip install openvino-genai
python example.py "What is the capital of France?"
"""

import json
import sys
from pathlib import Path

import openvino_genai as ov

HERE = Path(__file__).parent


def main(prompt, max_new_tokens=128):
    chat = json.loads((HERE / "chat.json").read_text(encoding="utf-8"))
    pipeline = ov.LLMPipeline(str(HERE), "CPU")
    print(
        pipeline.generate(
            chat["before"] + prompt + chat["after"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            apply_chat_template=False,
            stop_token_ids=set(chat["stop"]),
        )
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
