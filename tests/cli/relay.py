"""A stage of a pipeline that passes the stream through a slow connection.

    run(send, SLOW, receive, env=env)

Half of the stage moves its input into a TCP connection of the loopback with splice(2), so that
pages which the sender gave to the pipe with vmsplice(2) are never copied on their way into the
socket.  The other half reads the socket in small pieces, with small buffers, and stops for a
moment every now and then.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

SLOW = (sys.executable, str(Path(__file__)))

_BUFFER_BYTES = 1 << 16
_PIECE_BYTES = 1 << 13
_PAUSE_EVERY = 64
_PAUSE_S = 0.002


def _send(connection: socket.socket) -> None:
    while os.splice(0, connection.fileno(), 1 << 20):
        pass
    connection.shutdown(socket.SHUT_WR)


def _receive(connection: socket.socket) -> None:
    npieces = 0
    while data := connection.recv(_PIECE_BYTES):
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]
        npieces += 1
        if npieces % _PAUSE_EVERY == 0:
            time.sleep(_PAUSE_S)  # the reader is slow on purpose


def _connected() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a connection with small buffers: (for writing, for reading)."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        writer = socket.socket()
        writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        writer.connect(listener.getsockname())
        reader, _ = listener.accept()
    return writer, reader


def main() -> int:
    """Pass standard input on to standard output."""
    writer, reader = _connected()
    child = os.fork()
    if not child:
        reader.close()
        os.close(1)
        _send(writer)
        os._exit(0)
    writer.close()
    os.close(0)
    _receive(reader)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main())
