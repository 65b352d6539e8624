"""Runs in a guest. Fills memory and disk with a pattern that a seed gives, holds files, sockets and
a timer. Each time that a line comes through a FIFO, it says through another, in JSON, whether all is
as it was."""

import hashlib
import json
import os
import signal
import socket
import sys
import time

seed, asks, answers, mebibytes = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
# Small enough for the allocator to use the same memory again: page faults are dear where the guest's
# kernel is emulated.
CHUNK = 64 << 10
CHUNKS = mebibytes << 20 >> 16
FILE_CHUNKS = 64


def pattern(index):
    return hashlib.shake_128(f"{seed} {index}".encode()).digest(CHUNK)


memory = bytearray(CHUNKS * CHUNK)
for index in range(CHUNKS):
    memory[index * CHUNK : (index + 1) * CHUNK] = pattern(index)

with open("/root/pattern", "wb") as file:
    for index in range(FILE_CHUNKS):
        file.write(pattern(10_000 + index))
    file.flush()
    os.fsync(file.fileno())
# Not written back: it is in the guest's page cache alone.
with open("/root/unsynced", "wb") as file:
    file.write(pattern(20_000))
half_read = open("/root/pattern", "rb")
half_read.seek(3 * CHUNK + 17)
nameless = open("/root/nameless", "w+b")
nameless.write(pattern(30_000))
nameless.flush()
os.unlink("/root/nameless")

pair = socket.socketpair()
pair[0].sendall(b"on its way " + seed.encode())
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
served, _ = server.accept()
client.sendall(b"over TCP " + seed.encode())

ticks = 0


def tick(*_):
    global ticks
    ticks += 1


signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)


def same_file(path, first, count):
    with open(path, "rb") as file:
        return all(file.read(CHUNK) == pattern(first + n) for n in range(count))


def look():
    nameless.seek(0)
    at = half_read.tell()
    found = {
        "memory": all(
            memory[n * CHUNK : (n + 1) * CHUNK] == pattern(n) for n in range(CHUNKS)
        ),
        "synced file": same_file("/root/pattern", 10_000, FILE_CHUNKS),
        "unsynced file": same_file("/root/unsynced", 20_000, 1),
        "unlinked file": nameless.read() == pattern(30_000),
        "file position": at == 3 * CHUNK + 17 and half_read.read(5) == pattern(10_003)[17:22],
        "socket pair": pair[1].recv(100, socket.MSG_PEEK) == b"on its way " + seed.encode(),
        "TCP connection": served.recv(100, socket.MSG_PEEK) == b"over TCP " + seed.encode(),
    }
    half_read.seek(at)
    before = ticks
    time.sleep(1.2)
    found["timer"] = ticks > before
    served.sendall(b"pong")
    found["TCP answer"] = client.recv(4) == b"pong"
    return found


def say(words):
    with open(answers, "w") as file:
        file.write(words)


say("ready")
while True:
    with open(asks) as asked:
        asked.read()
    found = look()
    say(
        json.dumps(
            {
                "found": found,
                "time": time.time(),
                "random": os.urandom(16).hex(),
                "pid": os.getpid(),
            }
        )
    )
