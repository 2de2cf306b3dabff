#!/usr/bin/env bash
# The benchmark on an NVIDIA box: ai-server beside vLLM's own server, in one run. It asks no network for anything.
#
# Usage: bench/gpu.sh OUT [STEP ...]        (bench/gpu.sh --help lists the steps and options)
#
# PYTHON               the interpreter with torch, transformers, vllm and what app.py needs (python3)
# ENGINE_PYTHON_VLLM   the interpreter with vllm, where it lives in another environment; the peer runs under it as well
# MODELS               where models of random weights are made and kept, 32 GB (OUT/models)
# VLLM_CACHE_ROOT      vLLM's compile cache, the same for both servers (MODELS/vllm-cache)
set -euo pipefail

export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
export DO_NOT_TRACK=1 VLLM_NO_USAGE_STATS=1
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
