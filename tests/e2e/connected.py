"""Runs in a guest. Gives back in capitals what a server sends; when that ends, says how, and whether a
connection within the machine still works."""

import errno
import os
import socket
import sys

server = socket.create_server(("127.0.0.1", 0))
ours = socket.create_connection(server.getsockname())
theirs, _ = server.accept()

peer = socket.create_connection((sys.argv[1], int(sys.argv[2])))
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
outcome = "ended"
try:
    while words := peer.recv(1000):
        peer.sendall(words.upper())
except OSError as error:
    outcome = errno.errorcode[error.errno]
ours.sendall(b"hello")
with open("/root/outcome.new", "w") as file:
    file.write(f"{outcome}, within: {theirs.recv(5).decode()}\n")
os.rename("/root/outcome.new", "/root/outcome")
