"""OpenAI's own SDK, as it comes from PyPI: it knows nothing of where it is. A line for each thing that was right."""

import os
import sys

import openai
from openai import OpenAI

MODEL = os.environ["RATOON_MODEL"]
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "The weather in a city", "parameters": WEATHER}
client = OpenAI()
once = OpenAI(max_retries=0)


def ok(name, right, what=""):
    print(name, "ok" if right else f"WRONG: {what!r}", flush=True)


def chat(words, **more):
    return client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": words}], **more)


def error_of(kind, call):
    try:
        call()
    except kind as error:
        return error
    except openai.OpenAIError as error:
        sys.exit(f"{type(error)} in place of {kind}: {error}")
    sys.exit(f"no {kind}")


answer = chat("case whole")
ok("chat", answer.choices[0].message.content == "Grüße aus dem Norden." and answer.usage.completion_tokens == 4, answer)

text = "".join(chunk.choices[0].delta.content or "" for chunk in chat("case stream", stream=True) if chunk.choices)
ok("chat stream, UTF-8 in pieces", text == "Grüße 🌱 aus dem Norden.", text)

# Two calls in one answer, streamed; each is answered once, and the model goes on.
tools = [{"type": "function", "function": FUNCTION}]
calls = {}
for chunk in chat("case tools", tools=tools, stream=True):
    for part in chunk.choices[0].delta.tool_calls or [] if chunk.choices else []:
        call = calls.setdefault(part.index, {"id": part.id, "name": part.function.name, "arguments": ""})
        call["arguments"] += part.function.arguments or ""
ok("chat tools", [call["arguments"] for call in calls.values()] == ['{"city":"Oslo"}', '{"city":"Bergen"}'], calls)
history = [
    {"role": "user", "content": "case tools"},
    {"role": "assistant", "tool_calls": [
        {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
        for call in calls.values()]},
    *({"role": "tool", "tool_call_id": call["id"], "content": "rain"} for call in calls.values()),
]
answer = client.chat.completions.create(model=MODEL, messages=history, tools=tools)
ok("chat tool results", answer.choices[0].message.content == "It rains in both.", answer)

call = chat("case invalid", tools=tools).choices[0].message.tool_calls[0]
ok("arguments that are no JSON", call.function.arguments == '{"city": "Os', call)

answer = client.responses.create(model=MODEL, input="case whole")
ok("responses", answer.output_text == "Grüße aus dem Norden.", answer)
text, last = "", None
for event in client.responses.create(model=MODEL, input="case stream", stream=True):
    text += event.delta if event.type == "response.output_text.delta" else ""
    last = event
ok("responses stream", (text, last.type) == ("Grüße 🌱 aus dem Norden.", "response.completed"), last)
answer = client.responses.create(model=MODEL, input="case function", tools=[{"type": "function", **FUNCTION}])
call = answer.output[-1]
answer = client.responses.create(model=MODEL, input=[
    {"role": "user", "content": "case function"}, *[item.model_dump(exclude_none=True) for item in answer.output],
    {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}])
ok("responses tool result", answer.output_text == "It rains.", answer)

# The bridge waits and asks again: nothing of it is seen here.
ok("429 for a moment", chat("case soon").choices[0].message.content == "At last.")
error = error_of(openai.RateLimitError, lambda: once.chat.completions.create(
    model=MODEL, messages=[{"role": "user", "content": "case later"}]))
ok("429", error.status_code == 429 and "slow down" in error.message and error.response.headers["retry-after"] == "3600", error)
error = error_of(openai.BadRequestError, lambda: chat("case rule", n=2))
ok("400", error.code == "rule" and "n: must be 1" in error.message, error)
error = error_of(openai.BadRequestError, lambda: client.responses.create(
    model=MODEL, input="x", previous_response_id="resp_1"))
ok("400 of state at the provider", "previous_response_id" in error.message, error)
error = error_of(openai.PermissionDeniedError, lambda: client.chat.completions.create(
    model="another", messages=[{"role": "user", "content": "x"}]))
ok("403", error.code == "model", error)
error = error_of(openai.NotFoundError, lambda: client.models.list())
ok("404", error.code == "route", error)
error = error_of(openai.APIError, lambda: [None for _ in chat("case cut", stream=True)])
ok("a stream that is cut", "broke off before its end" in str(error), error)
