#!/usr/bin/env bash
# The whole path on real images, in minutes and without a GPU: write the images, pre-train a small
# CrossMAE, fine-tune it with few labels, train the same model from scratch, evaluate, visualize.
#     bash scripts/demo.sh [OUTPUT_FOLDER, default: output/demo in the repository]
# A second call reuses the installed packages and the images, and trains again.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

OUT="${1:-$ROOT/output/demo}"
case "$OUT" in /*) ;; *) OUT="$PWD/$OUT" ;; esac
MARK="$OUT/.crossmae-demo" # marks folders that this script may overwrite

# Pre-training pays off when labels are few: 10 per class here.
pretrain=(
    --model mae_vit_mini_patch4 --input_size 32 --cross_mae --weight_fm --use_input
    --decoder_depth 4 --mask_ratio 0.75 --kept_mask_ratio 0.25 --norm_pix_loss
    --batch_size 32 --epochs 40 --warmup_epochs 4 --lr 2e-3 --num_workers 1
)
classifier=(--model vit_mini_patch4 --input_size 32 --num_workers 1)
finetune=(
    --batch_size 10 --epochs 20 --warmup_epochs 2 --lr 2e-3 --layer_decay 0.65
    --drop_path 0 --aa "" --reprob 0
)

step=0
next_step() {
    step=$((step + 1))
    title="$*"
    printf '\n== %d/7  %s  (%d s so far)\n' "$step" "$title" $((SECONDS - started))
}

# Accuracy of the last epoch (not of the best one) on the 500 validation images.
evaluate() {
    python main_finetune.py --eval --resume "$1/checkpoint.pth" "${classifier[@]}" \
        --batch_size 100 --data_path "$OUT/data/few" | tee "$1/eval.txt"
}
accuracy_of() { sed -n 's/.*\* Acc@1 \([0-9.]*\) .*/\1/p' "$1/eval.txt" | tail -n 1; }

# From log.txt, one JSON line per epoch.
loss_of() {
    python - "$1/log.txt" <<'END'
import json, sys
losses = [json.loads(line)["train_loss"] for line in open(sys.argv[1])]
print(f"first epoch {losses[0]:.4f}, last epoch {losses[-1]:.4f}")
END
}

if [ -e "$OUT" ] && [ ! -e "$MARK" ] && [ -n "$(ls -A "$OUT")" ]; then
    stop "$OUT is not empty and not the output of an earlier demo; choose another folder."
fi
mkdir -p "$OUT" || stop "cannot create the folder $OUT."
touch "$MARK" || stop "cannot write into $OUT."
setup_environment requirements.txt scripts/requirements-demo.txt
rm -rf "$OUT/pretrain" "$OUT/finetune" "$OUT/scratch" "$OUT/reconstructions.png"
cd "$ROOT"

started=$SECONDS
trap 'printf "Stopped in step %d, \"%s\": the reason is above.\n" "$step" "$title" >&2' ERR
next_step "Images: 1,797 handwritten digits as PNG files"
python -m tools.demo_data "$OUT/data"

next_step "Pre-training a small CrossMAE on 1,297 images without labels"
torchrun --standalone --nproc_per_node=1 main_pretrain.py "${pretrain[@]}" \
    --data_path "$OUT/data" --output_dir "$OUT/pretrain"

next_step "Fine-tuning it with 10 labeled images per class"
torchrun --standalone --nproc_per_node=1 main_finetune.py "${classifier[@]}" "${finetune[@]}" \
    --finetune "$OUT/pretrain/checkpoint.pth" \
    --data_path "$OUT/data/few" --output_dir "$OUT/finetune"

next_step "The same fine-tuning from scratch, for comparison"
torchrun --standalone --nproc_per_node=1 main_finetune.py "${classifier[@]}" "${finetune[@]}" \
    --data_path "$OUT/data/few" --output_dir "$OUT/scratch"

next_step "Evaluating both"
evaluate "$OUT/finetune"
evaluate "$OUT/scratch"

next_step "Drawing reconstructions"
python -m tools.visualize --checkpoint "${OUT#"$ROOT"/}/pretrain/checkpoint.pth" \
    --images "$OUT/data/val" --num_images 4 --kept_mask_ratio 0.75 --out "$OUT/reconstructions.png"

next_step "Done"
cat <<END
loss        $(loss_of "$OUT/pretrain") (pre-training)
accuracy    $(accuracy_of "$OUT/finetune") % with pre-training, $(accuracy_of "$OUT/scratch") % without it (10 labels per class, 500 held-out images)
checkpoint  $OUT/finetune/checkpoint.pth
inspect     TensorBoard folder $OUT/pretrain, figure $OUT/reconstructions.png
next        cd $(printf %q "$ROOT") && .venv/bin/python main_finetune.py ${classifier[*]} --batch_size 32 --epochs 10 --warmup_epochs 1 --lr 1e-3 --aa '' --reprob 0 --finetune $(printf '%q --data_path %q --output_dir %q' "$OUT/pretrain/checkpoint.pth" "$OUT/data" "$OUT/finetune-all")
END
