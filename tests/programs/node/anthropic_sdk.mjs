// Anthropic's own SDK for Node, as it comes from npm: it knows nothing of where it is.
import Anthropic from "@anthropic-ai/sdk";
import { errorOf, ok } from "./told.mjs";

const model = process.env.RATOON_MODEL;
const input_schema = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const tools = [{ name: "weather", description: "The weather in a city", input_schema }];
const client = new Anthropic();
const once = new Anthropic({ maxRetries: 0 });
const asked = (words, more = {}) => ({ model, max_tokens: 100, messages: [{ role: "user", content: words }], ...more });

let answer = await client.messages.create(asked("case whole"));
ok("messages", answer.content[0].text === "Grüße aus dem Norden." && answer.usage.output_tokens === 4, answer);

answer = await client.beta.messages.create(asked("case whole", { betas: ["some-beta-2026-01-01"] }));
ok("messages of the beta client", answer.content[0].text === "Grüße aus dem Norden.", answer);

let text = "";
const stream = client.messages.stream(asked("case stream")).on("text", (piece) => (text += piece));
answer = await stream.finalMessage();
ok("messages stream, UTF-8 in pieces", text === "Grüße 🌱 aus dem Norden." && answer.stop_reason === "end_turn", answer);

answer = await client.messages.stream(asked("case tools", { tools })).finalMessage();
const calls = answer.content.filter((block) => block.type === "tool_use");
ok("messages tools", calls.map((call) => call.input.city).join() === "Oslo,Bergen", answer);
const results = calls.map((call) => ({ type: "tool_result", tool_use_id: call.id, content: "rain" }));
answer = await client.messages.create({ model, max_tokens: 100, tools, messages: [{ role: "user", content: "case tools" },
  { role: "assistant", content: answer.content }, { role: "user", content: results }] });
ok("messages tool results", answer.content[0].text === "It rains in both.", answer);

answer = await client.messages.countTokens({ model, messages: [{ role: "user", content: "how many?" }] });
ok("count_tokens", answer.input_tokens === 10, answer);

let error = await errorOf(Anthropic.RateLimitError, () => once.messages.create(asked("case later")));
ok("429", error.headers.get("retry-after") === "3600" && error.message.includes("slow down"), error);
error = await errorOf(Anthropic.APIError, () => once.messages.create(asked("case overloaded")));
ok("529", error.status === 529 && error.error.error.type === "overloaded_error", error);
const image = { type: "image", source: { type: "url", url: "https://example.com/x.png" } };
error = await errorOf(Anthropic.BadRequestError, () => client.messages.create(asked([image])));
ok("400", error.error.error.type === "invalid_request_error" && error.message.includes("url"), error);
error = await errorOf(Anthropic.PermissionDeniedError, () => client.messages.create({ ...asked("x"), model: "another" }));
ok("403", error.error.error.type === "permission_error", error);
error = await errorOf(Anthropic.NotFoundError, () => client.messages.batches.list());
ok("404", error.error.error.type === "not_found_error", error);
error = await errorOf(Anthropic.APIError, () => client.messages.stream(asked("case cut")).finalMessage());
ok("a stream that is cut", error.message.includes("broke off before its end"), error);
