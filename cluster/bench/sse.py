"""Server-sent events decoded from bytes as they arrive: the `data` of each event, without comments and other fields."""

from __future__ import annotations

DONE = b"[DONE]"


class SseDecoder:
    """Feed it body bytes cut anywhere; it returns the payloads of the events that are complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        events: list[bytes] = []
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events
