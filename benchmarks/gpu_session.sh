#!/usr/bin/env bash
# The first thing to run on a machine with a GPU: at most eight minutes, unattended, results under the device's name.
#
#     benchmarks/gpu_session.sh [PYTHON]
#
# Needs torch, triton, numpy, safetensors, tokenizers and pytest; no network. Each part has a time limit of its own, so a
# slow one does not take the others' time; a part that fails is named at the end and the exit code is 1.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
work=$(mktemp -d -p "${WORK:-/dev/shm}")
trap 'rm -rf "$work"' EXIT
failed=""

part() { # part NAME SECONDS COMMAND...
    local name=$1 seconds=$2
    shift 2
    echo "== $name (at most $seconds s)"
    timeout "$seconds" "$@" || failed="$failed $name"
}

part kernels 90 "$python" -m benchmarks.kernels --all --quick --save
part step 150 "$python" -m benchmarks.decode --model llama-3.2-3b --model llama-3.2-1b --model llama-3.2-1b --device cuda \
    --dtype bfloat16 --peers "" --batch 1,8,64 --rounds 1 --work "$work" --save
part train 60 "$python" -m benchmarks.optimizer_step --save
part tests 180 "$python" -m pytest -q -x -m gpu tests/kernels tests/decode

if [ -n "$failed" ]; then
    echo "failed or out of time:$failed"
    exit 1
fi
