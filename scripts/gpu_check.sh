#!/usr/bin/env bash
# All checks that need a GPU, in one call of under 8 minutes: correctness tests, then the benchmarks of
# docs/performance.md.
#     bash scripts/gpu_check.sh [OUTPUT_FOLDER, default: output/gpu]
# Uses the Python of .venv if it exists, else python3 on the PATH (with torch, torchvision, timm).
# Without a GPU it runs two tiny benchmarks on the CPU, to test the script itself.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
OUT="${1:-$ROOT/output/gpu}"
mkdir -p "$OUT"
cd "$ROOT"
PYTHON=python3
[ -x .venv/bin/python ] && PYTHON=.venv/bin/python

if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_gpu.py tests/test_models_cross.py | tee "$OUT/tests.txt"
    rows=()
    for model in small base large; do
        for kept in 0.25 0.75; do
            rows+=("--model mae_vit_${model}_patch16 --batch_size 256 --kept_mask_ratio $kept --steps 20")
        done
    done
    rows+=("--model mae_vit_base_patch16 --batch_size 256 --kept_mask_ratio 0.25 --steps 20 --compile")
    rows+=("--model mae_vit_base_patch16 --batch_size 256 --kept_mask_ratio 0.75 --steps 20 --compile")
    rows+=("--model mae_vit_base_patch16 --batch_size 1024 --kept_mask_ratio 0.25 --steps 10")
    rows+=("--what eval --model vit_base_patch16 --batch_size 256 --steps 20")
else
    echo "No GPU found: running two tiny benchmarks on the CPU to test the script."
    rows=("--model mae_vit_mini_patch4 --input_size 32 --batch_size 4 --repeats 2")
    rows+=("--what eval --model vit_mini_patch4 --input_size 32 --batch_size 4 --repeats 2")
fi

: >"$OUT/results.jsonl"
status=0
for row in "${rows[@]}"; do
    echo "== $row"
    # shellcheck disable=SC2086  # split the row into words
    if "$PYTHON" -m tools.benchmark $row --json >"$OUT/last.txt" 2>"$OUT/last.err"; then
        sed '$d' "$OUT/last.txt"
        tail -n 1 "$OUT/last.txt" >>"$OUT/results.jsonl"
    else
        echo "failed: $(cat "$OUT/last.err" "$OUT/last.txt" | tail -n 1)"
        status=1
    fi
done
echo "Results in $OUT/results.jsonl"
exit "$status"
