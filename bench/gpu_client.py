"""One process of the GPU benchmark's load: connections that each send their requests one after the other.

Reads one `Order` as a JSON line, says `ready`, waits for a line, carries the order out, and prints one `Load`.
Nothing is decoded while it runs: reads get a time stamp, and the counts are taken from the end of each reply.
"""

import asyncio
import gc
import json
import re
import sys
import time
from typing import TypedDict

CONTENT = re.compile(rb'"content": ?"[^"]')  # a piece of text that is not empty; both servers write it like this
PIECE = b'"content":'
COUNTED = re.compile(rb'"(?:eval_count|completion_tokens)": ?(\d+)')
PROMPT_COUNTED = re.compile(rb'"(?:prompt_eval_count|prompt_tokens)": ?(\d+)')
LAST_CHUNK = b"\r\n0\r\n\r\n"  # how a chunked reply ends
KEPT = 4096  # bytes kept of a reply's end
ERROR_SECONDS = 0.1  # how long the rest of an error's body is waited for


class Order(TypedDict):
    """What to send: for each connection the bodies of its requests, and when to give up."""

    port: int
    path: str
    connections: list[list[str]]
    limit: float


class Load(TypedDict):
    """What came back. Times are seconds; `began` and `ended` are readings of the machine's monotonic clock."""

    began: float
    ended: float
    requests: int
    tokens: int
    prompt_tokens: list[int]
    first: list[float]
    gaps: list[float]
    per_token: list[float]
    failed: int
    error: str
    cpu_seconds: float


class Reply:
    """One reply as it arrives: when pieces of text came, and how it ends."""

    def __init__(self) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        self.sent = time.monotonic()
        self.arrivals: list[float] = []
        self.status = b""
        self.tail = b""

    def take(self, data: bytes, now: float) -> None:
        """Note one read."""
        self.tail = (self.tail + data)[-KEPT:]
        self.status = self.status or data[:12]
        if (self.arrivals and PIECE in data) or CONTENT.search(data):
            self.arrivals.append(now)
        if self.status != b"HTTP/1.1 200":
            asyncio.get_running_loop().call_later(ERROR_SECONDS, self.end)
        elif self.tail.endswith(LAST_CHUNK):
            self.end()

    def end(self) -> None:
        """Nothing more will come."""
        if not self.ended.done():
            self.ended.set_result(None)

    def counts(self) -> tuple[int, int] | None:
        """Tokens of the answer and of the prompt, as the server counts them; None when it did not get that far."""
        answers, prompts = COUNTED.findall(self.tail), PROMPT_COUNTED.findall(self.tail)
        if self.status != b"HTTP/1.1 200" or not answers or not self.arrivals:
            return None
        return int(answers[-1]), int(prompts[-1]) if prompts else 0


class Connection(asyncio.Protocol):
    """A connection that is kept open."""

    def __init__(self) -> None:
        self.open = True
        self.reply: Reply | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport for requests."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Hand what came to the reply under way."""
        if self.reply is not None:
            self.reply.take(data, time.monotonic())

    def connection_lost(self, exc: Exception | None) -> None:
        """The other side, or we, closed it."""
        self.open = False
        if self.reply is not None:
            self.reply.end()

    async def ask(self, request: bytes, reply: Reply) -> None:
        """Send one request and wait for the end of its reply."""
        self.reply = reply
        self.transport.write(request)
        await reply.ended
        if reply.status != b"HTTP/1.1 200":
            self.transport.abort()
            self.open = False


def encode(order: Order, body: str) -> bytes:
    """Write one HTTP request."""
    payload = body.encode()
    head = (
        f"POST {order['path']} HTTP/1.1\r\nHost: 127.0.0.1:{order['port']}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


async def closed_loop(port: int, requests: list[bytes], replies: list[Reply]) -> None:
    """Send the requests of one connection, each when the one before is answered."""
    loop = asyncio.get_running_loop()
    connection: Connection | None = None
    for request in requests:
        if connection is None or not connection.open:
            _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
        replies.append(Reply())
        await connection.ask(request, replies[-1])
    if connection is not None:
        connection.transport.abort()


async def carry_out(order: Order, requests: list[list[bytes]]) -> Load:
    """All connections at once, until each is through or the time is over."""
    replies: list[Reply] = []
    began, cpu = time.monotonic(), time.process_time()
    tasks = [asyncio.create_task(closed_loop(order["port"], each, replies)) for each in requests]
    _, late = await asyncio.wait(tasks, timeout=order["limit"])
    ended, cpu = time.monotonic(), time.process_time() - cpu
    for task in late:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    errors = [repr(outcome) for outcome in outcomes if isinstance(outcome, BaseException)]
    load = summary(replies, sum(len(each) for each in requests), errors)
    return load | {"began": began, "ended": ended, "cpu_seconds": cpu}


def summary(replies: list[Reply], requests: int, errors: list[str]) -> Load:
    """Figures of all replies that are whole."""
    whole = [(reply, counts) for reply in replies if (counts := reply.counts()) is not None]
    gaps = [b - a for reply, _ in whole for a, b in zip(reply.arrivals, reply.arrivals[1:], strict=False)]
    bad = [ascii(reply.tail[-300:].decode(errors="replace")) for reply in replies if reply.counts() is None]
    return {
        "began": 0.0,
        "ended": 0.0,
        "requests": requests,
        "tokens": sum(answer for _, (answer, _) in whole),
        "prompt_tokens": [prompt for _, (_, prompt) in whole],
        "first": [reply.arrivals[0] - reply.sent for reply, _ in whole],
        "gaps": gaps,
        "per_token": [
            (reply.arrivals[-1] - reply.arrivals[0]) / (answer - 1) for reply, (answer, _) in whole if answer > 1
        ],
        "failed": requests - len(whole),
        "error": (errors + bad + [""])[0],
        "cpu_seconds": 0.0,
    }


def main() -> None:
    """Carry out the one order."""
    order: Order = json.loads(sys.stdin.readline())
    requests = [[encode(order, body) for body in bodies] for bodies in order["connections"]]
    gc.disable()  # a pause here would look like one of the server's
    print("ready", flush=True)
    if sys.stdin.readline():
        print(json.dumps(asyncio.run(carry_out(order, requests))), flush=True)


if __name__ == "__main__":
    main()
