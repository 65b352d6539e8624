"""A program that wants more than its model: each try, and what it was told. Plain sockets, so that nothing is tidied."""

import json
import os
import socket
import sys
import threading

MODEL = os.environ["RATOON_MODEL"]
ASK = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "hostile"}]}
KEYS = ["Authorization: Bearer evil", "authorization: Basic evil", "x-api-key: evil", "X_API_KEY: evil",
        "x.api.key: evil", "api-key: evil", "Cookie: evil=1", "Proxy-Authorization: evil", "OpenAI-Organization: evil",
        "OpenAI-Project: evil", "X-Ratoon-Token: evil", "X-Forwarded-Host: evil",
        "anthropic-beta: files-api-2025-04-14"]


def connect():
    return socket.create_connection(("127.0.0.1", 8019), timeout=120)


def answer(stream):
    """The status, and the error's type: none when it is no error, or none that an SDK would know."""
    raw = b""
    while True:
        try:
            piece = stream.recv(65536)
        except ConnectionResetError:
            piece = b""
        if not piece:
            break
        raw += piece
        head, found, body = raw.partition(b"\r\n\r\n")
        length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if found and length and len(body) >= int(length[0].split(b":")[1]):
            break
        if found and body.endswith(b"0\r\n\r\n"):
            break
    head, _, body = raw.partition(b"\r\n\r\n")
    status = head.split(b" ")[1].decode() if head else "nothing"
    if b"chunked" in head.lower():
        body = b"".join(body.split(b"\r\n")[1::2])
    try:
        return status, json.loads(body).get("error", {}).get("type")
    except ValueError:
        return status, None


def tell(name, told):
    print(name, *told, flush=True)


def say(name, bytes_):
    with connect() as stream:
        stream.sendall(bytes_)
        tell(name, answer(stream))


def post(name, path, body, headers=(), method="POST"):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}", *headers, "", ""]
    say(name, "\r\n".join(lines).encode() + body)


chat = "/v1/chat/completions"
post("keys", "/v1/messages", ASK, KEYS)
post("keys", chat, ASK, KEYS)
for method, path in [("POST", "/v1/files"), ("GET", "/v1/models"), ("POST", "/v1/messages/batches"),
                     ("POST", "/v1/messages?x=1"), ("POST", "/v1/../v1/messages"), ("GET", "/v1/messages"),
                     ("POST", "http://example.com/v1/messages")]:
    post("route", path, ASK, method=method)
url = {"type": "image", "source": {"type": "url", "url": "http://evil/x.png"}}
file = {"type": "document", "source": {"type": "file", "file_id": "file_1"}}
for name, path, more in [
        ("mcp", "/v1/messages", {"mcp_servers": [{"type": "url", "url": "http://evil", "name": "x"}]}),
        ("container", "/v1/messages", {"container": "c"}),
        ("url", "/v1/messages", {"messages": [{"role": "user", "content": [url]}]}),
        ("file", "/v1/messages", {"messages": [{"role": "user", "content": [file]}]}),
        ("search", chat, {"web_search_options": {}}),
        ("many", chat, {"n": 5}),
        ("state", "/v1/responses", {"messages": None, "input": "x", "previous_response_id": "r"}),
        ("model", chat, {"model": "another"})]:
    asked = {**ASK, **more}
    post(name, path, {name: value for name, value in asked.items() if value is not None})
tools = [{"type": "web_search_20250305", "name": "web_search"}, {"type": "code_execution_20250522", "name": "x"}]
post("tools", "/v1/messages", {**ASK, "tools": tools})
post("twice", chat, b'{"model":"m","model":"x"}')
say("lengths", b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{} ")
say("codings", b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}")
say("nonsense", b"\0\1\2\3\r\n\r\n")
post("large", chat, b" " * (1 << 20))

streams = [connect() for _ in range(200)]
body = json.dumps(ASK).encode()
told = {}


def ask(stream):
    try:
        stream.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (chat.encode(), len(body), body))
    except OSError:
        pass


for stream in streams:
    ask(stream)
for stream in streams:
    key = answer(stream)
    told[key] = told.get(key, 0) + 1
    stream.close()
for key, count in sorted(told.items(), key=str):
    print("crowd", *key, count)

# What there is to be found by root in this machine.
for folder, folders, names in os.walk("/proc"):
    folders[:] = [name for name in folders if name.isdigit()] if folder == "/proc" else []
    for name in {"environ", "cmdline"} & set(names):
        try:
            if b"sk-" in open(os.path.join(folder, name), "rb").read():
                print("LEAK", folder, name)
        except OSError:
            pass
