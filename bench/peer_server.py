"""The peer: the same xllamacpp server, with the same settings as our engine, but spoken to directly.

Usage: peer_server.py MODEL PATH CONTEXT_LENGTH THREADS. Prints its address and key as one JSON line, and serves until
its input is closed. THREADS 0 means ours (one core left free); `all` means llama.cpp's own default, every core.
"""

import json
import secrets
import sys
from pathlib import Path

import xllamacpp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import app


def main() -> None:
    """Start the server and stay until nobody needs it."""
    model, path, context_length, threads = sys.argv[1:]
    limit = min(int(context_length), app.MAX_CONTEXT_LENGTH)
    count = -1 if threads == "all" else app.compute_threads()
    spec = app.EngineSpec("llama.cpp", model, path, threads=count, context_length=limit, parallel=app.MAX_PARALLEL)
    key = secrets.token_hex(16)
    # The engine's own settings, not a copy of them: what differs between the two sides is only the way to the server.
    params = app.LlamaCppEngine()._parameters(xllamacpp, spec)
    params.api_keys = [key]
    server = xllamacpp.Server(params)
    print(json.dumps({"address": server.listening_address, "key": key}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
