// OpenAI's own SDK for Node, as it comes from npm: it knows nothing of where it is.
import OpenAI from "openai";
import { errorOf, ok } from "./told.mjs";

const model = process.env.RATOON_MODEL;
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const weather = { name: "weather", description: "The weather in a city", parameters };
const tools = [{ type: "function", function: weather }];
const client = new OpenAI();
const once = new OpenAI({ maxRetries: 0 });
const asked = (words, more = {}) => ({ model, messages: [{ role: "user", content: words }], ...more });
const chat = (words, more) => client.chat.completions.create(asked(words, more));

let answer = await chat("case whole");
ok("chat", answer.choices[0].message.content === "Grüße aus dem Norden." && answer.usage.completion_tokens === 4, answer);

let text = "";
for await (const chunk of await chat("case stream", { stream: true })) text += chunk.choices[0]?.delta.content ?? "";
ok("chat stream, UTF-8 in pieces", text === "Grüße 🌱 aus dem Norden.", text);

// Two calls in one answer, put together by the SDK's own helper; each is answered once, and the model goes on.
const { message } = (await client.chat.completions.stream(asked("case tools", { tools })).finalChatCompletion()).choices[0];
ok("chat tools", message.tool_calls.map((call) => call.function.arguments).join() === '{"city":"Oslo"},{"city":"Bergen"}', message);
const results = message.tool_calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: "rain" }));
answer = await client.chat.completions.create({ ...asked("case tools", { tools }),
  messages: [{ role: "user", content: "case tools" }, message, ...results] });
ok("chat tool results", answer.choices[0].message.content === "It rains in both.", answer);

const four = await Promise.all([1, 2, 3, 4].map(() => chat("case whole")));
ok("four chats at once", four.every((one) => one.choices[0].message.content === "Grüße aus dem Norden."), four);

answer = await client.responses.create({ model, input: "case whole" });
ok("responses", answer.output_text === "Grüße aus dem Norden.", answer);
let last;
text = "";
for await (const event of await client.responses.create({ model, input: "case stream", stream: true })) {
  text += event.type === "response.output_text.delta" ? event.delta : "";
  last = event;
}
ok("responses stream", text === "Grüße 🌱 aus dem Norden." && last.type === "response.completed", last);
answer = await client.responses.create({ model, input: "case function", tools: [{ type: "function", ...weather }] });
const { call_id } = answer.output.at(-1);
answer = await client.responses.create({ model, input: [{ role: "user", content: "case function" }, ...answer.output,
  { type: "function_call_output", call_id, output: "rain" }] });
ok("responses tool result", answer.output_text === "It rains.", answer);

let error = await errorOf(OpenAI.RateLimitError, () => once.chat.completions.create(asked("case later")));
ok("429", error.message.includes("slow down") && error.headers.get("retry-after") === "3600", error);
error = await errorOf(OpenAI.BadRequestError, () => chat("case rule", { n: 2 }));
ok("400", error.code === "rule" && error.message.includes("n: must be 1"), error);
error = await errorOf(OpenAI.PermissionDeniedError, () => client.chat.completions.create({ ...asked("x"), model: "another" }));
ok("403", error.code === "model", error);
error = await errorOf(OpenAI.NotFoundError, () => client.models.list());
ok("404", error.code === "route", error);
error = await errorOf(OpenAI.APIError, async () => {
  for await (const _ of await chat("case cut", { stream: true }));
});
ok("a stream that is cut", error.message.includes("broke off before its end"), error);
