"""The load client: plain asyncio sockets in a process of their own, the same for every server that is measured.

Reads one `Order` as JSON from each line of its input, and answers each with one JSON line.
"""

import asyncio
import json
import re
import sys
import time
from typing import Any, TypedDict

CONTENT = re.compile(rb'"content":"[^"]')  # an event that carries text; both servers write it like this
COUNTED = re.compile(rb'"(?:eval_count|predicted_n)": ?(\d+)')  # what the server says at the end; the last one counts
TAIL = 11  # bytes kept of the chunk before, in case a match spans two: one less than a whole match


class Order(TypedDict):
    """What to send: one connection for each of `bodies`, all at once."""

    host: str
    port: int
    path: str
    headers: dict[str, str]
    bodies: list[dict[str, Any]]
    leave_after: int  # close every connection once the first stream has this many events; 0: stay to the end
    seconds: float  # close what is still open after this time; 0: wait for the end


class StreamResult(TypedDict):
    """What one connection saw. Times are seconds since it was opened; -1 where nothing came."""

    first: float
    last: float
    tokens: int
    complete: bool


class Result(TypedDict):
    """The answer to one order. `left` is the clock reading (time.monotonic) when connections were closed early."""

    streams: list[StreamResult]
    left: float


class Stream(asyncio.Protocol):
    """One request and what came back: when the first text and the last byte arrived, and how many tokens."""

    def __init__(self, request: bytes, leave_after: int, everybody: list["Stream"]) -> None:
        self.request = request
        self.leave_after = leave_after
        self.everybody = everybody
        self.closed = asyncio.get_running_loop().create_future()
        self.first = self.last = -1.0
        self.events = 0
        self.left = 0.0
        self.tail = b""
        self.body = bytearray()
        self.began = time.monotonic()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request at once."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Note the time; everything else waits until the measurement is over, except counting the events."""
        now = time.monotonic() - self.began
        texts = len(CONTENT.findall(self.tail + data))
        self.tail = data[-TAIL:]
        if texts and self.first < 0:
            self.first = now
        self.last = now
        self.events += texts
        self.body += data
        if self.leave_after and self.events >= self.leave_after:
            for stream in self.everybody:
                stream.leave()

    def leave(self) -> None:
        """Close the connection in the middle of the stream."""
        if not self.left and not self.closed.done():
            self.left = time.monotonic()
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The stream is over."""
        if not self.closed.done():
            self.closed.set_result(None)

    def result(self) -> StreamResult:
        """What this connection saw; an answer that is not a stream of text is an error of the measurement."""
        if not self.body.startswith(b"HTTP/1.1 200") and (self.body or not self.left):
            raise RuntimeError(f"the server answered: {bytes(self.body[:500])!r}")
        counts = COUNTED.findall(self.body)
        tokens = int(counts[-1]) if counts else self.events
        return {"first": self.first, "last": self.last, "tokens": tokens, "complete": bool(counts)}


def encode(order: Order, body: dict[str, Any]) -> bytes:
    """Write one HTTP request; the server is to close the connection at the end."""
    payload = json.dumps(body).encode()
    fixed = {"Host": f"{order['host']}:{order['port']}", "Content-Type": "application/json", "Connection": "close"}
    headers = fixed | order["headers"] | {"Content-Length": str(len(payload))}
    lines = [f"POST {order['path']} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + payload


async def connect(stream: Stream, order: Order) -> None:
    """Open one connection; the clock of its stream is running already."""
    await asyncio.get_running_loop().create_connection(lambda: stream, order["host"], order["port"])


async def carry_out(order: Order) -> Result:
    """Open all connections at once and wait until each is closed."""
    loop = asyncio.get_running_loop()
    streams: list[Stream] = []
    requests = [encode(order, body) for body in order["bodies"]]
    streams.extend(Stream(request, order["leave_after"], streams) for request in requests)
    await asyncio.gather(*(connect(stream, order) for stream in streams))
    if order["seconds"]:
        for stream in streams:
            loop.call_later(order["seconds"], stream.leave)
    await asyncio.gather(*(stream.closed for stream in streams))
    return {"streams": [stream.result() for stream in streams], "left": max(stream.left for stream in streams)}


def main() -> None:
    """Carry out orders until the input ends."""
    loop = asyncio.new_event_loop()
    for line in sys.stdin:
        answer = loop.run_until_complete(carry_out(json.loads(line)))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
