#!/usr/bin/env bash
# The whole path on real pictures, in minutes and without a GPU: write the pictures, pre-train a small
# CrossMAE, fine-tune it with few labels, do the same from scratch to compare, evaluate, draw.
#     bash scripts/demo.sh [OUTPUT_FOLDER, default: output/demo in the repository]
# A second call re-uses the installed packages and the pictures, and trains again.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

OUT="${1:-$ROOT/output/demo}"
case "$OUT" in /*) ;; *) OUT="$PWD/$OUT" ;; esac
MARK="$OUT/.crossmae-demo" # says that the folder is this script's own

started=$SECONDS
step=0
next_step() {
    step=$((step + 1))
    printf '\n== %d/7  %s  (%d s so far)\n' "$step" "$*" $((SECONDS - started))
}

# The settings. What pre-training is worth shows where labels are few: 5 per class here.
pretrain=(
    --model mae_vit_mini_patch4 --input_size 32 --cross_mae --weight_fm --use_input
    --decoder_depth 4 --mask_ratio 0.75 --kept_mask_ratio 0.75 --norm_pix_loss
    --batch_size 64 --epochs 80 --warmup_epochs 8 --blr 2e-3 --num_workers 0
)
finetune=(
    --model vit_mini_patch4 --input_size 32 --nb_classes 10 --batch_size 10
    --epochs 60 --warmup_epochs 5 --lr 1e-3 --layer_decay 0.75 --drop_path 0.1
    --aa "" --reprob 0 --num_workers 0
)

setup_environment requirements.txt scripts/requirements-demo.txt
if [ -e "$OUT" ] && [ ! -e "$MARK" ] && [ -n "$(ls -A "$OUT")" ]; then
    stop "$OUT is not empty and not the output of an earlier demo; name another folder."
fi
mkdir -p "$OUT" || stop "cannot create the folder $OUT."
touch "$MARK" || stop "cannot write into $OUT."
rm -rf "$OUT/pretrain" "$OUT/finetune" "$OUT/scratch" "$OUT/reconstructions.png"
cd "$ROOT"

started=$SECONDS
next_step "Pictures: 1,797 handwritten digits as PNG files"
python -m util.demo_data "$OUT/data"

next_step "Pre-training a small CrossMAE on 1,297 pictures, without their labels"
torchrun --standalone --nproc_per_node=1 main_pretrain.py "${pretrain[@]}" \
    --data_path "$OUT/data" --output_dir "$OUT/pretrain"

next_step "Fine-tuning it with 5 labelled pictures per class"
torchrun --standalone --nproc_per_node=1 main_finetune.py "${finetune[@]}" \
    --finetune "$OUT/pretrain/checkpoint.pth" \
    --data_path "$OUT/data/few" --output_dir "$OUT/finetune"

next_step "The same fine-tuning from scratch, to compare"
torchrun --standalone --nproc_per_node=1 main_finetune.py "${finetune[@]}" \
    --data_path "$OUT/data/few" --output_dir "$OUT/scratch"

# Accuracy of the last state (not of the best epoch) on the 500 validation pictures.
evaluate() {
    python main_finetune.py --eval --resume "$1/checkpoint.pth" --model vit_mini_patch4 \
        --input_size 32 --nb_classes 10 --batch_size 100 --num_workers 0 \
        --data_path "$OUT/data/few" | tee "$1/eval.txt"
}
next_step "Evaluating both"
evaluate "$OUT/finetune"
evaluate "$OUT/scratch"

next_step "Drawing reconstructions"
python -m util.visualize --checkpoint "$OUT/pretrain/checkpoint.pth" \
    --images "$OUT/data/val" --out "$OUT/reconstructions.png"

# From log.txt, one JSON line per epoch: the mean loss of the first and of the last epoch.
losses="$(python - "$OUT/pretrain/log.txt" <<'END'
import json, sys
losses = [json.loads(line)["train_loss"] for line in open(sys.argv[1])]
print(f"first epoch {losses[0]:.4f}, last epoch {losses[-1]:.4f}")
END
)"
accuracy_of() { sed -n 's/.*\* Acc@1 \([0-9.]*\) .*/\1/p' "$1/eval.txt" | tail -n 1; }

next_step "Done"
cat <<END
loss        $losses (pre-training)
accuracy    $(accuracy_of "$OUT/finetune") % with pre-training, $(accuracy_of "$OUT/scratch") % without (same fine-tuning, 500 other pictures)
checkpoint  $OUT/finetune/checkpoint.pth
to look at  TensorBoard folder $OUT/pretrain, picture $OUT/reconstructions.png
to go on    tensorboard --logdir $OUT
END
