// Answer a prompt with llama.cpp:
//   npm install node-llama-cpp@3.22.1
//   node example.mjs "What is the capital of France?"
import path from "node:path";
import { fileURLToPath } from "node:url";
import { getLlama, LlamaChatSession } from "node-llama-cpp";

const folder = path.dirname(fileURLToPath(import.meta.url));
const llama = await getLlama({ build: "never", gpu: false });
const model = await llama.loadModel({ modelPath: path.join(folder, "model.gguf") });
const context = await model.createContext({ contextSize: { max: 2048 } });
const session = new LlamaChatSession({ contextSequence: context.getSequence() });
const prompt = process.argv[2] ?? "What is the capital of France?";
console.log(await session.prompt(prompt, { temperature: 0, maxTokens: 128 }));
