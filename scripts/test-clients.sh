#!/usr/bin/env bash
# Runs the official clients of every protocol (tests/clients) against a server that is started for them.
#
#   scripts/test-clients.sh [PYTEST-ARGUMENT ...]
#
# Environment: PYTHON (interpreter for a new .venv-clients, default python3), VENV (the server's, default .venv).
# With BASE_URL (and MODEL, EMBED_MODEL) that server is asked instead. The exit code is pytest's.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
CLIENTS=.venv-clients
LOCK=requirements/clients.txt
JAVASCRIPT=tests/clients/js
MODEL=${MODEL:-smollm2:135m}
EMBED_MODEL=${EMBED_MODEL:-all-minilm}
export MODEL EMBED_MODEL
server=
folder=

fail() {
    echo "ai-server: $*" >&2
    exit 1
}

stop() { # however this script ends, nothing of it stays
    if [ -n "$server" ]; then
        kill -TERM "$server" 2>/dev/null || true
        wait "$server" || true
    fi
    if [ -n "$folder" ]; then rm -rf "$folder"; fi
}
trap stop EXIT

# An installed lock leaves a copy of itself behind; an equal copy means that there is nothing to do.
install_python() {
    if cmp -s "$LOCK" "$CLIENTS/.installed"; then return; fi
    "$PYTHON" -m venv "$CLIENTS" || fail "no virtual environment could be made in $CLIENTS."
    echo "Installing $LOCK"
    rm -f "$CLIENTS/.installed"
    "$CLIENTS/bin/python" -m pip install --disable-pip-version-check --no-input -qqq -r "$LOCK" ||
        fail "$LOCK could not be installed; the next run tries again."
    cp "$LOCK" "$CLIENTS/.installed"
}

install_javascript() {
    local lock="$JAVASCRIPT/package-lock.json"
    if ! command -v npm >/dev/null; then
        echo "npm is not installed, the JavaScript clients will be skipped"
    elif ! cmp -s "$lock" "$JAVASCRIPT/node_modules/.installed"; then
        echo "Installing $lock"
        (cd "$JAVASCRIPT" && npm ci --silent) || fail "$lock could not be installed; the next run tries again."
        cp "$lock" "$JAVASCRIPT/node_modules/.installed"
    fi
}

free_port() {
    "$CLIENTS/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

ask() { # ask PATH [CURL-OPTION ...]
    local path=$1
    shift
    curl -sf --noproxy '*' "$BASE_URL$path" "$@"
}

start_server() {
    local port
    port=$(free_port)
    folder=$(mktemp -d)
    export BASE_URL="http://127.0.0.1:$port"
    STATE_DIR="$folder/state" LOG_FILE="$folder/app.log" HOST=127.0.0.1 PORT="$port" \
        "$VENV/bin/python" app.py >"$folder/output.txt" 2>&1 </dev/null &
    server=$!
    until ask /health/ready >/dev/null; do
        kill -0 "$server" 2>/dev/null || fail "the server ended: $(tail -n 5 "$folder/output.txt")"
        sleep 0.1
    done
    for name in "$MODEL" "$EMBED_MODEL"; do
        ask /api/pull -d "{\"model\": \"$name\", \"stream\": false}" >/dev/null || fail "$name could not be pulled."
    done
}

install_python
install_javascript
if [ -z "${BASE_URL:-}" ]; then
    [ -x "$VENV/bin/python" ] || fail "$VENV/bin/python not found. Run scripts/install.sh first."
    start_server
fi
"$CLIENTS/bin/python" -m pytest tests/clients "$@"
