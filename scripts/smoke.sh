#!/usr/bin/env bash
# End-to-end check of a running server: diag, pull, job, models, chat, stream, errors, log.
# scripts/dai-cazzo.ps1 takes the same steps in PowerShell. Exits 1 and names the steps that failed.
#
# Environment: BASE_URL (http://127.0.0.1:8005), MODEL (smollm2:135m), TIMEOUT_SECONDS (600, for the pull),
# LOG_FILE (the server's log, to be searched for out-of-memory errors; not checked when unset),
# PROMPT (What is the capital of France?), EXPECT (a text the whole answer must contain; any answer will do when unset),
# PYTHON (python3). Needs curl and Python 3.
set -euo pipefail

BASE_URL=${BASE_URL:-http://127.0.0.1:8005}
BASE_URL=${BASE_URL%/}
MODEL=${MODEL:-smollm2:135m}
TIMEOUT_SECONDS=${TIMEOUT_SECONDS:-600}
LOG_FILE=${LOG_FILE:-}
PROMPT=${PROMPT:-What is the capital of France?}
EXPECT=${EXPECT:-}
PYTHON=${PYTHON:-python3}
export BASE_URL MODEL PROMPT EXPECT

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()
why=

# request METHOD PATH [BODY]: the body lands in $work/body, the headers in $work/headers, the status in $status.
request() {
    local method=$1 path=$2 body=()
    if [ $# -gt 2 ]; then body=(--data-binary "$3" -H 'Content-Type: application/json'); fi
    : >"$work/body"
    : >"$work/headers"
    status=$(curl -sS -N --noproxy '*' --max-time "$TIMEOUT_SECONDS" -X "$method" -o "$work/body" -D "$work/headers" \
        -w '%{http_code}' ${body[@]+"${body[@]}"} "$BASE_URL$path" 2>"$work/curl") || true
    if [ "$status" = 000 ]; then why="$method $path: $(cat "$work/curl")"; fi
}

# expect_status CODE ...: true when the last status is one of them.
expect_status() {
    local code
    for code in "$@"; do
        if [ "$status" = "$code" ]; then return 0; fi
    done
    why=${why:-"status $status instead of $*: $(head -c 300 "$work/body")"}
    return 1
}

# json EXPRESSION: prints the value of a Python expression over the last reply, `d`, and the environment, `env`.
json() {
    "$PYTHON" -c 'import json, os, sys
d, env = json.load(open(sys.argv[1], encoding="utf-8")), os.environ
print(eval(sys.argv[2]))' "$work/body" "$1" 2>/dev/null
}

# check EXPRESSION REASON: true when the expression holds.
check() {
    if [ "$(json "bool($1)")" = True ]; then return 0; fi
    why="$2: $(head -c 300 "$work/body")"
    return 1
}

# chat_body true|false: a chat request, streamed or whole.
chat_body() {
    STREAM=$1 "$PYTHON" -c 'import json, os
env = os.environ
messages = [{"role": "user", "content": env["PROMPT"]}]
print(json.dumps({"model": env["MODEL"], "messages": messages, "stream": env["STREAM"] == "true", "max_tokens": 48, "temperature": 0}))'
}

step() { # step NAME FUNCTION
    why=
    if "$2"; then
        echo "✓ $1"
    else
        echo "✗ $1: $why"
        failed+=("$1")
    fi
}

step_diag() {
    local gpu=False
    request GET /diag
    expect_status 200 || return 1
    check 'd["version"] and d["python"] and d["engines"]' 'version, python or engines are missing' || return 1
    check 'isinstance(d["cuda"]["available"], bool)' 'cuda.available is not true or false' || return 1
    case $BASE_URL in
        http://127.0.0.1:* | http://localhost:*)
            if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then gpu=True; fi
            check "d['cuda']['available'] is $gpu" "nvidia-smi lists a GPU: $gpu, but diag says otherwise"
            ;;
    esac
}

step_pull() {
    request POST /pull "{\"model\": \"$MODEL\"}"
    expect_status 200 202 || return 1
    job=$(json 'd["id"]') || true
    if [ -z "$job" ]; then
        why='the reply has no job id'
        return 1
    fi
}

step_job() {
    local deadline=$((SECONDS + TIMEOUT_SECONDS)) state=
    why='there is no job'
    if [ -z "${job:-}" ]; then return 1; fi
    while [ "$SECONDS" -lt "$deadline" ]; do
        why=
        request GET "/jobs/$job"
        expect_status 200 || return 1
        state=$(json 'd["status"]') || true
        case $state in
            succeeded) return 0 ;;
            failed | cancelled)
                why="the job $state: $(json 'd["error"]')"
                return 1
                ;;
        esac
        sleep 0.5
    done
    why="still $state after $TIMEOUT_SECONDS s"
    return 1
}

step_models() {
    request GET /models
    expect_status 200 || return 1
    check 'env["MODEL"].lower() in [m["name"].lower() for m in d["models"]]' "$MODEL is not listed"
}

step_chat() {
    request POST /chat "$(chat_body false)"
    expect_status 200 || return 1
    check 'd["done"] is True and d["message"]["role"] == "assistant" and d["message"]["content"]' 'no answer' || return 1
    check 'd["eval_count"] > 0 and d["prompt_eval_count"] > 0 and d["total_duration"] >= d["eval_duration"] > 0' 'wrong counters' || return 1
    check 'env["EXPECT"] in d["message"]["content"]' "the answer does not contain '$EXPECT'" || return 1
    if ! grep -qi '^x-backend: ' "$work/headers"; then
        why='the header X-Backend is missing'
        return 1
    fi
}

step_stream() {
    request POST /chat "$(chat_body true)"
    expect_status 200 || return 1
    # The lines become one list, so that the same checks apply.
    "$PYTHON" -c 'import json, sys
lines = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8") if line.strip()]
json.dump(lines, open(sys.argv[1], "w", encoding="utf-8"))' "$work/body" 2>/dev/null || {
        why='a line is not JSON'
        return 1
    }
    check 'not any("error" in line for line in d)' 'the stream has an error' || return 1
    check '[line["done"] for line in d].count(True) == 1 and d[-1]["done"] is True' 'not exactly one last line' || return 1
    check 'len(d) > 1 and "".join(line.get("message", {}).get("content", "") for line in d)' 'no text'
}

step_errors() {
    request POST /chat '{"messages": []}'
    expect_status 400 || return 1
    check '"Missing '\''model'\'' in payload" in d["error"]' 'wrong message for a missing model' || return 1
    request POST /chat '{"model": "never-pulled/model", "prompt": "Hello", "stream": false}'
    expect_status 404 || return 1
    check '"/pull" in d["error"]' 'the message for an unknown model does not name /pull' || return 1
    request POST /chat '{"model": '
    expect_status 400 || return 1
    check 'd["error"]' 'no message for broken JSON'
}

step_log() {
    if [ ! -r "$LOG_FILE" ]; then
        why="$LOG_FILE cannot be read"
        return 1
    fi
    if grep -iE 'out[ _-]of[ _-]memory|OutOfMemory|oom[ _-]?kill|bad_alloc' "$LOG_FILE" >"$work/oom"; then
        why="the log has an out-of-memory error: $(head -n 1 "$work/oom")"
        return 1
    fi
}

echo "Checking $BASE_URL with $MODEL"
step 'diag: versions, CUDA and engines' step_diag
step 'pull: accepted as a job' step_pull
step 'job: succeeded' step_job
step 'models: the model is listed' step_models
step 'chat: a whole answer' step_chat
step 'stream: lines and one end' step_stream
step 'errors: 400, 404 and broken JSON' step_errors
if [ -n "$LOG_FILE" ]; then
    step 'log: no out-of-memory error' step_log
else
    echo '- log: not checked (LOG_FILE is not set)'
fi

if [ ${#failed[@]} -gt 0 ]; then
    printf 'Failed step: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo 'All steps passed.'
