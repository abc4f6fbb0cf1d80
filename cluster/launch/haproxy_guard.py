"""Runs HAProxy for Ray Serve, on loopback and never alone: `python haproxy_guard.py HAPROXY -db -f CONFIG ...`.

Ray Serve starts the binary that RAY_SERVE_HAPROXY_BINARY_PATH names. A private cluster names a script that runs this
file, for three reasons. The metrics and statistics ports in Ray's configuration listen on every interface, with no way
to say otherwise; here they are bound to loopback. A request whose body was spliced hides that its client has left until
the server writes, which for an answer that is not streamed is its end; here requests are not spliced. And HAProxy
outlives a proxy actor that is killed; here the kernel ends it with its parent. Standard library only: the interpreter
starts in isolated mode.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
_ANY_INTERFACE = re.compile(r"^(\s*bind\s+)\*?:(\d+)", re.MULTILINE)
_SPLICE_REQUEST = re.compile(r"^\s*option\s+splice-request\s*\n", re.MULTILINE)


def bind_to_loopback(config: str, keep: str | None = None) -> str:
    """HAProxy's configuration with every any-interface listener moved to 127.0.0.1, but for the port `keep`."""

    def replace(match: re.Match[str]) -> str:
        return match[0] if match[2] == keep else f"{match[1]}127.0.0.1:{match[2]}"

    return _ANY_INTERFACE.sub(replace, config)


def without_spliced_requests(config: str) -> str:
    """HAProxy's configuration in which a client's departure is seen whatever the length of its request."""
    return _SPLICE_REQUEST.sub("", config)


def end_with_parent() -> None:
    """Ask the kernel to kill this process (exec keeps the request) when its parent dies."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the request
        sys.exit(1)


def main(argv: list[str]) -> None:
    """`argv` is the public port, which keeps its interface, then the real command."""
    end_with_parent()
    public_port, *command = argv
    path = Path(command[command.index("-f") + 1])
    text = path.read_text(encoding="utf-8")
    path.write_text(without_spliced_requests(bind_to_loopback(text, keep=public_port)), encoding="utf-8")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
