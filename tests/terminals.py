"""Commands on a terminal of their own."""

import fcntl
import os
import pty
import struct
import subprocess
import termios
from typing import Any


def on_terminal(command: list[str], *, columns: int = 0, streams: str = "stdout", **options: Any) -> tuple[int, str]:
    """Exit status of a command, and what it shows on a terminal.

    `columns`: how wide the terminal says it is, with 40 lines; 0: it does not say. `streams`: which of the command's
    are the terminal. The rest is for Popen.
    """
    master, terminal = pty.openpty()
    if columns:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(command, **dict.fromkeys(streams.split(), terminal), **options)
    os.close(terminal)
    seen = b""
    while True:
        try:
            block = os.read(master, 65536)
        except OSError:  # Linux says EIO where the other end is closed
            break
        if not block:
            break
        seen += block
    os.close(master)
    return process.wait(), seen.decode()
