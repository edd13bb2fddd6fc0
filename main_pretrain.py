"""Pre-train a Vision Transformer by masked reconstruction: CrossMAE (--cross_mae) or MAE.

torchrun --nproc_per_node=4 main_pretrain.py --cross_mae --weight_fm --use_input ...
"""

import argparse
import logging
from functools import partial

from engine_pretrain import train_one_epoch
from util.build import build_pretrain_model
from util.checkpoint import init_from
from util.data.loaders import build_train_loader
from util.data.remote import localize
from util.data.transforms import PRETRAIN_CROP_SCALE
from util.datasets import build_pretrain_dataset
from util.distributed import wrap_ddp
from util.eval.knn import OnlineKnn
from util.io.errors import UserError
from util.io.pretrained import read_pretrained
from util.layers.attention import get_attention_backend
from util.layers.vit import compile_model
from util.lr_decay import param_groups_weight_decay
from util.optim import NativeScalerWithGradNormCount, build_adamw, choose_amp_dtype
from util.run.checks import adopt_input, check_ranges, check_shared, set_mean_std
from util.run.flags import FlagParser, add_flag, parse_flags, shared_parser
from util.run.launch import launch
from util.run.output_dir import (
    clear_output_dir,
    lock_output_dir,
    prepare_output,
    resolve_resume,
)
from util.run.replay import replay_step, write_nothing
from util.run.setup import log_epoch, set_lr, start_run, tensorboard_writer, training_time
from util.run.signals import install_handlers
from util.run.startup import log_summary, startup_summary, write_run_json
from util.run.state import RunState
from util.vis.image_log import ImageLog

logger = logging.getLogger(__name__)

RANGES = {
    **dict.fromkeys(("mask_ratio", "kept_mask_ratio"), "(0, 1)"),  # they scale lr, for MAE too
    "decoder_depth": "[1, 1000]",
    "decoder_embed_dim": "[1, 65536]",
    "log_images": "[0, 1000]",
    "knn_every": "[0, 10000000]",
}


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """All flags of pre-training with their defaults.

    Args:
        add_help: False for a launcher that uses this as a parent parser.
    """
    parser = FlagParser(
        "main_pretrain.py", description=__doc__, parents=[shared_parser()], add_help=add_help
    )
    parser.set_defaults(epochs=400, min_lr=0.0, warmup_epochs=40, keep_every=200)
    parser.set_defaults(crop_scale=PRETRAIN_CROP_SCALE)
    add_model_flags(partial(add_flag, parser.add_argument_group("pre-training model")))
    add_training_flags(partial(add_flag, parser.add_argument_group("masking, loss and logging")))
    return parser


def add_model_flags(flag) -> None:
    flag("--model", str, "mae_vit_large_patch16", "name in models_cross.py or models_mae.py")
    flag("--cross_mae", bool, False, "CrossMAE; without it, the MAE baseline")
    flag("--decoder_depth", int, 8, "decoder blocks")
    flag("--decoder_embed_dim", int, None, "decoder width (default: the model's)")
    text = "CrossMAE: every decoder block attends to its own learned sum of encoder feature maps"
    flag("--weight_fm", bool, False, text)
    text = (
        "CrossMAE: encoder blocks to sum, negative from the end; -1 alone means all (default: -1)"
    )
    flag("--use_fm", int, [-1], text, nargs="+", metavar="BLOCK")
    flag("--use_input", bool, False, "CrossMAE: also sum the encoder's input tokens")
    flag("--self_attn", bool, False, "CrossMAE: self-attention in every decoder block")
    text = (
        "initialize from these weights (file, https:// or hf:// URL, folder of transformers or "
        "timm, timm:NAME) with a new optimizer"
    )
    flag("--init_from", str, "", text)


def add_training_flags(flag) -> None:
    flag("--mask_ratio", float, 0.75, "fraction of masked patches")
    text = "fraction of all patches that CrossMAE predicts, at most --mask_ratio"
    flag("--kept_mask_ratio", float, 0.75, text)
    flag("--norm_pix_loss", bool, False, "predict pixels normalized within each patch")
    text = "scale the learning rate by mask/kept instead of kept/mask ratio"
    flag("--inverse_lr", bool, False, text)
    flag("--no_lr_scale", bool, False, "do not scale the learning rate by the ratios")
    text = (
        "fast: crops of uint8 tensors, normalized on the device; pillow: the recipe's transform, "
        "also taken for RGBA and arrays"
    )
    flag("--loader", str, "fast", text, choices=["fast", "pillow"])
    text = (
        "log reconstructions of N images, decoder attention and feature-map weights to "
        "TensorBoard, about 20 times in a run"
    )
    flag("--log_images", int, 0, text, metavar="N")
    text = (
        "kNN accuracy of the class token on --knn_data, every N epochs and after the last one "
        "(default: 0, never)"
    )
    flag("--knn_every", int, 0, text, metavar="N")
    flag("--knn_data", str, "", "folder or URL with train/ and val/ for --knn_every", metavar="DIR")
    text = "passed to DDP; set automatically where --use_fm leaves encoder blocks unused"
    flag("--find_unused_parameters", bool, False, text)


def check_args(args) -> None:
    """Refuse flags that cannot act.

    Raises:
        UserError: with the flag and the remedy.
    """
    check_shared(args)
    check_ranges(args, RANGES)
    if args.init_from and args.resume not in ("", "auto"):
        raise UserError("--init_from starts a run and --resume continues one: give one of them.")
    if args.log_images and not (args.output_dir or args.log_dir):
        raise UserError("--log_images logs to TensorBoard: give --output_dir or --log_dir.")
    if bool(args.knn_every) != bool(args.knn_data):
        raise UserError("--knn_every N and --knn_data DIR belong together: give both or none.")
    of_crossmae = dict(weight_fm=False, use_input=False, self_attn=False, use_fm=[-1])
    given = [name for name, default in of_crossmae.items() if getattr(args, name) != default]
    if given and not args.cross_mae:
        raise UserError(f"--{given[0]} is for CrossMAE: add --cross_mae or leave it out.")
    if not args.weight_fm and {"use_input", "use_fm"} & set(given):
        raise UserError("--use_input and --use_fm choose what --weight_fm sums: add --weight_fm.")
    if not args.cross_mae and not args.no_lr_scale and args.kept_mask_ratio != args.mask_ratio:
        logger.warning(
            "MAE predicts every masked patch, but --kept_mask_ratio %g scales its lr, as in the "
            "public code; set it to --mask_ratio, or give --no_lr_scale",
            args.kept_mask_ratio,
        )


def lr_scale(args) -> tuple[float, str]:
    """Learning-rate factor for the fraction of masked patches that is predicted, and its text."""
    mask, kept = args.mask_ratio, args.kept_mask_ratio
    if args.no_lr_scale:
        return 1.0, ""
    if args.inverse_lr:
        return mask / kept, f" × {mask}/{kept}"
    return kept / mask, f" × {kept}/{mask}"


def main(args) -> None:
    """One pre-training run."""
    check_args(args)
    start_run(args)
    checkpoint = resolve_resume(args)
    if args.replay:
        write_nothing(args)
    pretrained = read_pretrained(args.init_from) if args.init_from and not args.resume else None
    stored = (checkpoint or pretrained or {}).get("args", {})
    source = args.resume or args.init_from
    adopt_input(args, get_args_parser(), stored, source, may_differ=checkpoint is None)
    set_mean_std(args)
    args.data_path = localize(args.data_path, args.shard_cache, "train", "", any_part=True)
    dataset = build_pretrain_dataset(args)  # before the model: mistakes show at once
    loader = build_train_loader(dataset, args)
    knn = OnlineKnn(args)
    amp_dtype = choose_amp_dtype(args.amp, args.device)
    attention = get_attention_backend(args.enable_flash_attention2, args.device, amp_dtype)
    model = build_pretrain_model(args, attention)
    if pretrained is not None:
        init_from(model, pretrained, args.init_from)
        del pretrained
    prepare_output(args)
    lock = lock_output_dir(args)  # noqa: F841 (held while this function runs)
    lr_text = set_lr(args, *lr_scale(args))
    model.to(args.device)
    groups = param_groups_weight_decay(model, args.weight_decay)
    optimizer = build_adamw(groups, args.lr, betas=(0.9, 0.95))
    loss_scaler = NativeScalerWithGradNormCount(amp_dtype, args.device.type)
    state = RunState(args, model, optimizer, loss_scaler)
    state.resume(checkpoint)
    del checkpoint  # as large as the model and its optimizer
    state.register_dataset(dataset, len(loader))
    clear_output_dir(args, state.epoch)

    data_text = f"{len(dataset)} images {dataset.description}, {len(loader)} batches per epoch"
    summary = startup_summary(args, model, lr_text, attention.name, amp_dtype, data_text)
    log_summary(args, summary)
    write_run_json(args, summary)
    if args.compile:
        compile_model(model, args.compile)
    ddp_model = wrap_ddp(model, args.device, args.find_unused_parameters or model.has_unused_blocks)
    install_handlers()
    with (
        training_time(args, state),
        tensorboard_writer(args, state, len(loader)) as writer,
        replay_step(args, state, ddp_model, loader),
    ):
        run_epochs(args, state, ddp_model, loader, knn, writer)


def run_epochs(args, state: RunState, ddp_model, loader, knn: OnlineKnn, writer) -> None:
    """Train, measure kNN, log and save, epoch by epoch."""
    image_log = ImageLog(args, writer, loader)
    for epoch in range(state.epoch, args.epochs):
        loader.set_epoch(epoch, state.iteration)
        stats = train_one_epoch(
            ddp_model,
            loader,
            state.optimizer,
            args.device,
            epoch,
            state.loss_scaler,
            log_writer=writer,
            args=args,
            state=state,
        )
        stats = {f"train_{k}": v for k, v in stats.items()}
        stats |= knn.measure(state.model, epoch, state.loss_scaler.amp_dtype, writer)
        log_epoch(args, stats | {"epoch": epoch})
        state.end_epoch()
        image_log.show(state.model, epoch)


if __name__ == "__main__":
    launch(main, parse_flags(get_args_parser()))
