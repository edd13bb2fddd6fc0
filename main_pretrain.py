"""Pre-train a Vision Transformer by masked reconstruction: CrossMAE (--cross_mae) or MAE.

torchrun --nproc_per_node=4 main_pretrain.py --cross_mae --weight_fm --use_input ...
"""

import argparse
import logging

from engine_pretrain import train_one_epoch
from util.build import build_pretrain_model
from util.checkpoint import load_matching
from util.data.loaders import build_train_loader
from util.datasets import build_pretrain_dataset
from util.distributed import wrap_ddp
from util.io.errors import UserError
from util.layers.attention import get_attention_backend
from util.layers.compile import compile_blocks
from util.lr_decay import param_groups_weight_decay
from util.optim import NativeScalerWithGradNormCount, build_adamw, choose_amp_dtype
from util.run import launch as run
from util.run.flags import check_shared, prepare_output, shared_parser
from util.run.startup import log_startup_summary
from util.run.state import RunState, resolve_resume
from util.vis.image_log import ImageLog

logger = logging.getLogger(__name__)


def get_args_parser() -> argparse.ArgumentParser:
    """All flags of pre-training with their defaults."""
    parser = argparse.ArgumentParser(
        "main_pretrain.py", description=__doc__, parents=[shared_parser()]
    )
    parser.set_defaults(epochs=400, min_lr=0.0, warmup_epochs=40, keep_every=200)
    for add_flags in (
        add_model_flags,
        add_masking_flags,
        add_optim_flags,
        add_data_flags,
        add_seeing_flags,
        add_launch_flags,
    ):
        add_flags(parser)
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pre-training model")
    group.add_argument(
        "--model", default="mae_vit_large_patch16", help="name in models_cross.py or models_mae.py"
    )
    group.add_argument(
        "--cross_mae", action="store_true", help="CrossMAE; without it, the MAE baseline"
    )
    group.add_argument("--decoder_depth", type=int, default=8, help="decoder blocks (default: 8)")
    group.add_argument("--decoder_embed_dim", type=int, help="decoder width (default: the model's)")
    group.add_argument(
        "--weight_fm",
        action="store_true",
        help="CrossMAE: every decoder block reads its own learned mix of encoder feature maps",
    )
    group.add_argument(
        "--use_fm",
        type=int,
        nargs="+",
        default=[-1],
        metavar="BLOCK",
        help=(
            "CrossMAE: encoder blocks to mix, negative from the end; -1 alone means all "
            "(default: -1)"
        ),
    )
    group.add_argument(
        "--use_input", action="store_true", help="CrossMAE: also mix in the encoder's input tokens"
    )
    group.add_argument(
        "--self_attn", action="store_true", help="CrossMAE: self-attention in every decoder block"
    )
    group.add_argument(
        "--init_from",
        default="",
        help="start from these weights (file, https or hf:// address), with a fresh optimizer",
    )


def add_masking_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("masking and loss")
    group.add_argument(
        "--mask_ratio", type=float, default=0.75, help="share of patches hidden (default: 0.75)"
    )
    group.add_argument(
        "--kept_mask_ratio",
        type=float,
        default=0.75,
        help="share of all patches that CrossMAE predicts, at most --mask_ratio (default: 0.75)",
    )
    group.add_argument(
        "--norm_pix_loss", action="store_true", help="predict pixels normalised within each patch"
    )


def add_optim_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pre-training learning rate")
    group.add_argument(
        "--inverse_lr",
        action="store_true",
        help="scale the learning rate by mask/kept instead of kept/mask ratio",
    )
    group.add_argument(
        "--no_lr_scale", action="store_true", help="do not scale the learning rate by ratios"
    )


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pre-training data")
    group.add_argument(
        "--loader",
        choices=["fast", "pillow"],
        default="fast",
        help=(
            "fast: uint8 crops, normalised on the device; pillow: the recipe's chain (default: "
            "fast)"
        ),
    )


def add_seeing_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures of the run")
    group.add_argument(
        "--log_images",
        type=int,
        default=0,
        metavar="N",
        help="reconstructions of N pictures, the decoder's attention and the feature-map weights "
        "on TensorBoard, about 20 times in a run (default: 0)",
    )


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pre-training, distributed")
    group.add_argument(
        "--find_unused_parameters",
        action="store_true",
        help="passed to DDP; set by itself where --use_fm leaves blocks unread",
    )


def check_args(args) -> None:
    """Refuse flags that would not act.

    Raises:
        UserError: with the flag and the remedy.
    """
    check_shared(args)
    if args.init_from and args.resume not in ("", "auto"):
        raise UserError("--init_from starts a run and --resume goes on with one: give one of them.")
    for name in ("mask_ratio", "kept_mask_ratio"):  # both enter lr, for the baseline too
        if not 0 < getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must lie between 0 and 1.")
    if not args.cross_mae and not args.no_lr_scale and args.kept_mask_ratio != args.mask_ratio:
        logger.warning(
            "MAE predicts every hidden patch, but --kept_mask_ratio %g scales its lr, as in the "
            "public code; set it to --mask_ratio, or give --no_lr_scale",
            args.kept_mask_ratio,
        )
    if args.log_images and not (args.output_dir or args.log_dir):
        raise UserError("--log_images draws on TensorBoard: give --output_dir or --log_dir.")
    if args.decoder_depth < 1:
        raise UserError(f"--decoder_depth is {args.decoder_depth}; it must be at least 1.")
    if not args.cross_mae:
        for flag in ("weight_fm", "use_input", "self_attn"):
            if getattr(args, flag):
                raise UserError(f"--{flag} belongs to CrossMAE: add --cross_mae or leave it out.")
        if args.use_fm != [-1]:
            raise UserError("--use_fm belongs to CrossMAE: add --cross_mae or leave it out.")
    elif not args.weight_fm and (args.use_input or args.use_fm != [-1]):
        raise UserError("--use_input and --use_fm choose what --weight_fm mixes: add --weight_fm.")


def lr_scale(args) -> tuple[float, str]:
    """Factor on the learning rate for the share of patches predicted, and its text."""
    if args.no_lr_scale:
        return 1.0, ""
    if args.inverse_lr:
        return (
            args.mask_ratio / args.kept_mask_ratio,
            f" × {args.mask_ratio}/{args.kept_mask_ratio}",
        )
    return args.kept_mask_ratio / args.mask_ratio, f" × {args.kept_mask_ratio}/{args.mask_ratio}"


def main(args) -> None:
    """One pre-training run."""
    check_args(args)
    run.start_run(args)
    dataset = build_pretrain_dataset(args)  # before the model: mistakes show at once
    loader = build_train_loader(dataset, args)
    amp_dtype = choose_amp_dtype(args.amp, args.device)
    attention_backend = get_attention_backend(args.enable_flash_attention2, args.device, amp_dtype)
    model = build_pretrain_model(args, attention_backend)
    newest = resolve_resume(args)
    if args.init_from and not args.resume:
        load_matching(model, args.init_from)
    prepare_output(args)
    lr_text = run.set_lr(args, *lr_scale(args))
    model.to(args.device)
    groups = param_groups_weight_decay(model, args.weight_decay)
    optimizer = build_adamw(groups, args.lr, betas=(0.9, 0.95))
    loss_scaler = NativeScalerWithGradNormCount(amp_dtype, args.device.type)
    state = RunState(args, model, optimizer, loss_scaler)
    state.resume(newest)
    del newest  # as large as the model and its optimizer

    state.register_dataset(dataset)
    data_text = f"{len(dataset)} images {dataset.description}, {len(loader)} batches per epoch"
    log_startup_summary(args, model, lr_text, attention_backend.name, data_text)
    if args.compile:
        compile_blocks(model)
    unused = args.find_unused_parameters or getattr(model, "has_unused_blocks", False)
    ddp_model = wrap_ddp(model, args.device, unused)

    with run.recording(args, state, len(loader)) as writer:
        board = ImageLog(args, writer, loader)
        for epoch in range(state.epoch, args.epochs):
            loader.set_epoch(epoch, state.iteration)
            stats = train_one_epoch(
                ddp_model, loader, optimizer, args.device, epoch, loss_scaler, writer, args, state
            )
            run.log_epoch(args, {f"train_{k}": v for k, v in stats.items()} | {"epoch": epoch})
            board.show(model, epoch)
            state.end_epoch()


if __name__ == "__main__":
    run.run(main, get_args_parser().parse_args())
