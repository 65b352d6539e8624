"""Anthropic's own SDK, as it comes from PyPI: it knows nothing of where it is. A line for each thing that was right."""

import os
import sys

import anthropic
from anthropic import Anthropic

MODEL = os.environ["RATOON_MODEL"]
TOOLS = [{"name": "weather", "description": "The weather in a city", "input_schema": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}]
client = Anthropic()
once = Anthropic(max_retries=0)


def ok(name, right, what=""):
    print(name, "ok" if right else f"WRONG: {what!r}", flush=True)


def asked(words, **more):
    return {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": words}], **more}


def error_of(kind, call):
    try:
        call()
    except kind as error:
        return error
    except anthropic.AnthropicError as error:
        sys.exit(f"{type(error)} in place of {kind}: {error}")
    sys.exit(f"no {kind}")


answer = client.messages.create(**asked("case whole"))
ok("messages", answer.content[0].text == "Grüße aus dem Norden." and answer.usage.output_tokens == 4, answer)

answer = client.beta.messages.create(**asked("case whole", betas=["some-beta-2026-01-01"]))
ok("messages of the beta client", answer.content[0].text == "Grüße aus dem Norden.", answer)

with client.messages.stream(**asked("case stream")) as stream:
    text = "".join(stream.text_stream)
    last = stream.get_final_message()
ok("messages stream, UTF-8 in pieces", text == "Grüße 🌱 aus dem Norden." and last.stop_reason == "end_turn", last)

with client.messages.stream(**asked("case tools", tools=TOOLS)) as stream:
    answer = stream.get_final_message()
calls = [block for block in answer.content if block.type == "tool_use"]
ok("messages tools", [call.input for call in calls] == [{"city": "Oslo"}, {"city": "Bergen"}], answer)
results = [{"type": "tool_result", "tool_use_id": call.id, "content": "rain"} for call in calls]
answer = client.messages.create(model=MODEL, max_tokens=100, tools=TOOLS, messages=[
    {"role": "user", "content": "case tools"}, {"role": "assistant", "content": answer.content},
    {"role": "user", "content": results}])
ok("messages tool results", answer.content[0].text == "It rains in both.", answer)

count = client.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": "how many?"}])
ok("count_tokens", count.input_tokens == 10, count)

ok("529 for a moment", client.messages.create(**asked("case soon")).content[0].text == "At last.")
error = error_of(anthropic.RateLimitError, lambda: once.messages.create(**asked("case later")))
ok("429", error.response.headers["retry-after"] == "3600" and "slow down" in str(error), error)
error = error_of(anthropic.APIStatusError, lambda: once.messages.create(**asked("case overloaded")))
ok("529", error.status_code == 529 and error.body["error"]["type"] == "overloaded_error", error)
error = error_of(anthropic.BadRequestError, lambda: client.messages.create(**asked([
    {"type": "image", "source": {"type": "url", "url": "https://example.com/x.png"}}])))
ok("400", error.body["error"]["type"] == "invalid_request_error" and "url" in str(error), error)
error = error_of(anthropic.PermissionDeniedError, lambda: client.messages.create(**{**asked("x"), "model": "another"}))
ok("403", error.body["error"]["type"] == "permission_error", error)
error = error_of(anthropic.NotFoundError, lambda: client.messages.batches.list())
ok("404", error.body["error"]["type"] == "not_found_error", error)


def read_all():
    with client.messages.stream(**asked("case cut")) as stream:
        for _ in stream.text_stream:
            pass


error = error_of(anthropic.APIError, read_all)
ok("a stream that is cut", "broke off before its end" in str(error), error)
