#!/usr/bin/env bash
# What needs a GPU, in under 8 minutes and with the decisive rows first: correctness, speed and memory of
# every way to run a step, the largest kernels, the loader.
#     bash scripts/gpu_check.sh [OUTPUT_FOLDER, default: output/gpu]
# Uses the Python of .venv if it exists, else python3 on the PATH (torch >= 2.11, torchvision, timm).
# Every group is a process of its own; a failure does not end the others, and each result is written
# as soon as it is there. BUDGET sets the seconds for all of it. Without a GPU: tiny sizes on the CPU.
set -uo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
OUT="$(realpath -m "${1:-$ROOT/output/gpu}")"
mkdir -p "$OUT"
cd "$ROOT" || exit 1
PYTHON=python3
[ -x .venv/bin/python ] && PYTHON=.venv/bin/python
BUDGET="${BUDGET:-460}"

status=0
: >"$OUT/results.jsonl"
for group in correctness base compiled kernels sizes loader; do
    left=$((BUDGET - SECONDS))
    if [ "$left" -lt 5 ]; then
        echo "== $group: no time left" | tee "$OUT/$group.txt"
        status=1
        continue
    fi
    echo "== $group"
    timeout --kill-after=5 "$left" "$PYTHON" scripts/gpu_check.py "$group" "$OUT/results.jsonl" 2>&1 |
        tee "$OUT/$group.txt" || status=1
done
echo "Results in $OUT after $SECONDS s"
exit "$status"
