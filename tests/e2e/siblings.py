"""Runs in a guest. Draws from generators that were seeded long before, each time that a line comes through a
FIFO. Two of them are told of a wake as docs/fork-safety.md shows it; one is not."""

import json
import os
import random
import secrets
import sys
import uuid

asks, answers = sys.argv[1:]


def wakes():
    with open("/run/ratoon/wakes") as file:
        return file.read()


untold = random.Random()
untold.random(), random.random(), uuid.uuid4(), secrets.token_hex(4)
seen = wakes()
with open(answers, "w") as file:
    file.write("ready")
while True:
    with open(asks) as file:
        file.read()
    if wakes() != seen:
        seen = wakes()
        random.seed()
    said = {
        "program's random, told": random.random(),
        "program's secrets": secrets.token_hex(8),
        "program's uuid": str(uuid.uuid4()),
        "program's os.urandom": os.urandom(8).hex(),
        "same: a generator of its own": untold.random(),
    }
    with open(answers, "w") as file:
        json.dump(said, file)
