#!/usr/bin/env bash
# Starts the server, pulls one model, says when both are ready, and stays until the server ends.
# Ctrl-C and SIGTERM stop the server cleanly; a second one kills it. The server's own exit code is returned.
#
# Environment: HOST (127.0.0.1), PORT (8005), MODEL (smollm2:135m; empty pulls none), VENV (.venv),
# and every setting of the server.
set -euo pipefail
cd "$(dirname "$0")/.."

export HOST=${HOST:-127.0.0.1} PORT=${PORT:-8005}
MODEL=${MODEL-smollm2:135m}
PYTHON=${VENV:-.venv}/bin/python
server=
stopping=

fail() {
    echo "ai-server: $*" >&2
    exit 1
}

# The address to reach the server from this machine: a wildcard is listened on, not connected to.
case $HOST in
    0.0.0.0) address="http://127.0.0.1:$PORT" ;;
    ::) address="http://[::1]:$PORT" ;;
    *:*) address="http://[$HOST]:$PORT" ;;
    *) address="http://$HOST:$PORT" ;;
esac

# Prints why HOST and PORT cannot be listened on; nothing when they can.
BIND_PROBE='
import errno, os, socket, sys
host, port = os.environ["HOST"], os.environ["PORT"]
if not port.isdigit() or not 0 < int(port) < 65536:
    sys.exit(print(f"PORT must be a number from 1 to 65535, not {port!r}."))
try:
    family, kind, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name == "posix")
        probe.bind(address)
except OSError as error:
    if error.errno == errno.EADDRINUSE:
        print(f"port {port} on {host} is already taken. Stop what listens there, or choose another: PORT={int(port) % 65535 + 1} make run")
    else:
        print(f"cannot listen on {host} port {port}: {error.strerror or error}")
'

# Prints one of: starting, pulling, ready, failed: REASON. Failures from before this start do not count.
READY_PROBE='
import datetime, json, sys, urllib.error, urllib.parse, urllib.request
base, model, started = sys.argv[1:]
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
def get(path):
    try:
        with opener.open(base + path, timeout=5) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""
def failed_now(job):
    if job["status"] not in ("failed", "cancelled") or not job["finished_at"]:
        return False
    return datetime.datetime.fromisoformat(job["finished_at"]).timestamp() >= int(started)
def state():
    if get("/health/ready")[0] != 200:
        return "starting"
    if not model or get("/models/" + urllib.parse.quote(model, safe="/:@"))[0] == 200:
        return "ready"
    status, body = get("/jobs")
    jobs = json.loads(body)["jobs"] if status == 200 else []
    mine = [job for job in jobs if job["model"] == model] or jobs
    if mine and failed_now(mine[0]):
        return "failed: " + str(mine[0]["error"] or mine[0]["status"])
    return "pulling"
print(state())
'

alive() { kill -0 "$server" 2>/dev/null; }

stop() { # the first signal asks, the second one kills
    if [ -z "$stopping" ]; then
        stopping=yes
        echo "Stopping ai-server ..."
        kill -TERM "$server" 2>/dev/null || true
    else
        kill -KILL "$server" 2>/dev/null || true
    fi
}

# Waits for the server to end and returns its exit code. A trapped signal interrupts `wait`, so it is asked again;
# the last `wait` gives the code that the shell keeps for an ended child.
join() {
    local code=0
    wait "$server" || true
    while alive; do
        wait "$server" || true
    done
    wait "$server" || code=$?
    if [ -n "$stopping" ] && { [ "$code" -eq 143 ] || [ "$code" -eq 130 ]; }; then
        code=0 # ended by the signal that we sent
    fi
    return "$code"
}

wait_until_ready() { # 0 when ready, 1 when the pull failed or the server is ending
    local state shown=
    while alive && [ -z "$stopping" ]; do
        state=$(trap '' INT && "$PYTHON" -c "$READY_PROBE" "$address" "$MODEL" "$started") || state=starting
        case $state in
            ready) return 0 ;;
            failed:*)
                echo "ai-server: the pull of $MODEL failed: ${state#failed: }" >&2
                return 1
                ;;
            pulling)
                if [ -z "$shown" ]; then echo "Pulling $MODEL ..."; fi
                shown=yes
                ;;
        esac
        sleep 0.2
    done
    return 1
}

announce() {
    local body='{"model":"'${MODEL:-smollm2:135m}'","messages":[{"role":"user","content":"What is the capital of France?"}]}'
    printf '\nai-server is ready at %s\nTry it:\n  curl -N %s/chat -d '\''%s'\''\nStop it with Ctrl-C.\n\n' "$address" "$address" "$body"
}

[ -x "$PYTHON" ] || fail "$PYTHON not found. Run scripts/install.sh first, or use: make run"
reason=$("$PYTHON" -c "$BIND_PROBE")
[ -z "$reason" ] || fail "$reason"

trap stop INT TERM HUP
started=$(date +%s)
"$PYTHON" app.py ${MODEL:+--pull "$MODEL"} </dev/null &
server=$!

code=0
if wait_until_ready; then
    announce
elif alive && [ -z "$stopping" ]; then
    stop
    join || true
    exit 1
fi
join || code=$?
if [ -z "$stopping" ]; then echo "ai-server: the server ended with exit code $code." >&2; fi
exit "$code"
