// A small real model behind OpenAI's Chat API, as far as the tests need it: one conversation at a time, the answer's
// text as it comes out, tools told as the model was trained to (<tools>, <tool_call>).
// server.mjs MODULES-FOLDER MODEL.gguf: prints its URL.

import http from "node:http";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const [modules, model] = process.argv.slice(2);
const require = createRequire(pathToFileURL(modules + "/"));
const {getLlama, LlamaCompletion} = await import(pathToFileURL(require.resolve("node-llama-cpp")));
const llama = await getLlama({build: "never", gpu: false, logLevel: "error"});
const loaded = await llama.loadModel({modelPath: model});
const context = await loaded.createContext({contextSize: 4096, threads: 2});

// Qwen's own template (ChatML).
function prompt(request) {
    const text = (content) => typeof content === "string" ? content : (content ?? []).map((part) => part.text ?? "").join("");
    const tools = (request.tools ?? []).map((tool) => JSON.stringify(tool)).join("\n");
    const told = tools && `\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>\n${tools}\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>`;
    let all = "", system = "You are a helpful assistant.";
    for (const message of request.messages) {
        if (message.role === "system" || message.role === "developer") {
            system = text(message.content);
            continue;
        }
        const calls = (message.tool_calls ?? []).map((call) =>
            `\n<tool_call>\n{"name": "${call.function.name}", "arguments": ${call.function.arguments}}\n</tool_call>`).join("");
        const content = message.role === "tool" ? `<tool_response>\n${text(message.content)}\n</tool_response>` : text(message.content);
        all += `<|im_start|>${message.role === "tool" ? "user" : message.role}\n${content}${calls}<|im_end|>\n`;
    }
    return `<|im_start|>system\n${system}${told}<|im_end|>\n${all}<|im_start|>assistant\n`;
}

let turn = Promise.resolve();
async function answer(request) {
    const sequence = context.getSequence();
    try {
        const completion = new LlamaCompletion({contextSequence: sequence});
        // Special tokens are what they are in the template, not text.
        const tokens = loaded.tokenize(prompt(request), true);
        const text = await completion.generateCompletion(tokens, {
            maxTokens: Math.min(request.max_completion_tokens ?? request.max_tokens ?? 200, 200),
            temperature: request.temperature ?? 0, seed: request.seed ?? 1,
            customStopTriggers: ["<|im_end|>", "</tool_call>"],
        });
        const call = text.includes("<tool_call>") && !text.includes("</tool_call>") ? text + "\n</tool_call>" : text;
        return {text: call, input: tokens.length, output: loaded.tokenize(call).length};
    } finally {
        sequence.dispose();
    }
}

const server = http.createServer(async (request, response) => {
    const pieces = [];
    for await (const piece of request) pieces.push(piece);
    if (request.method !== "POST" || request.url !== "/v1/chat/completions") {
        response.writeHead(404).end("{}");
        return;
    }
    const asked = JSON.parse(Buffer.concat(pieces));
    const mine = turn.then(() => answer(asked));
    turn = mine.catch(() => {});
    let told;
    try {
        told = await mine;
    } catch (error) {
        response.writeHead(500, {"content-type": "application/json"});
        response.end(JSON.stringify({error: {message: String(error), type: "server_error"}}));
        return;
    }
    console.error(JSON.stringify(told.text));
    const usage = {prompt_tokens: told.input, completion_tokens: told.output, total_tokens: told.input + told.output};
    const common = {id: "chatcmpl-1", created: 1, model: asked.model};
    if (!asked.stream) {
        response.writeHead(200, {"content-type": "application/json"});
        response.end(JSON.stringify({...common, object: "chat.completion", usage,
            choices: [{index: 0, message: {role: "assistant", content: told.text}, finish_reason: "stop"}]}));
        return;
    }
    response.writeHead(200, {"content-type": "text/event-stream"});
    const say = (value) => response.write(`data: ${JSON.stringify({...common, object: "chat.completion.chunk", ...value})}\n\n`);
    say({choices: [{index: 0, delta: {role: "assistant", content: told.text}, finish_reason: null}]});
    say({choices: [{index: 0, delta: {}, finish_reason: "stop"}]});
    say({choices: [], usage});
    response.end("data: [DONE]\n\n");
});
server.listen(0, "127.0.0.1", () => console.log(`http://127.0.0.1:${server.address().port}`));
