"""Fine-tune a pre-trained encoder as a classifier, or evaluate one (--eval --resume FILE).

torchrun --nproc_per_node=4 main_finetune.py --finetune output/pretrain/checkpoint.pth ...
"""

import argparse
import logging

import torch
from timm.utils import ModelEmaV3

from engine_finetune import evaluate, train_one_epoch
from util.build import build_classifier, build_criterion
from util.checkpoint import load_model, load_pretrained
from util.data.checks import (
    check_augmentation,
    check_classes,
    check_trained_classes,
    drop_default_policy,
)
from util.data.loaders import build_eval_loader, build_train_loader
from util.data.remote import localize
from util.data.transforms import FINETUNE_CROP_SCALE
from util.datasets import build_dataset
from util.distributed import broadcast_buffers, wrap_ddp
from util.eval.predict import predict
from util.eval.report import report_evaluation
from util.io.checkpoint_file import read_checkpoint
from util.io.errors import UserError
from util.io.pretrained import read_pretrained
from util.layers.attention import get_attention_backend
from util.layers.vit import compile_model
from util.lr_decay import param_groups_lrd
from util.optim import NativeScalerWithGradNormCount, build_adamw, build_lars, choose_amp_dtype
from util.run.checks import adopt_input, set_mean_std
from util.run.ema import with_ema_weights
from util.run.finetune_flags import (
    LINEAR_PROBE,
    add_finetune_flags,
    check_cutmix,
    check_flags,
)
from util.run.flags import FlagParser, parse_flags, shared_parser
from util.run.launch import launch
from util.run.output_dir import (
    clear_output_dir,
    lock_output_dir,
    make_writable,
    prepare_output,
    resolve_resume,
)
from util.run.replay import replay_step, write_nothing
from util.run.setup import log_epoch, set_lr, start_run, tensorboard_writer, training_time
from util.run.signals import install_handlers
from util.run.startup import log_summary, startup_summary, write_run_json
from util.run.state import RunState

logger = logging.getLogger(__name__)


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """All flags of fine-tuning with their defaults.

    Args:
        add_help: False for a launcher that uses this as a parent parser.
    """
    parser = FlagParser(
        "main_finetune.py", description=__doc__, parents=[shared_parser()], add_help=add_help
    )
    parser.set_defaults(epochs=50, min_lr=1e-6, warmup_epochs=5, keep_every=0)
    parser.set_defaults(crop_scale=FINETUNE_CROP_SCALE)
    add_finetune_flags(parser)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line; --linear_probe changes the defaults of the others."""
    return parse_flags(get_args_parser(), argv, {"linear_probe": LINEAR_PROBE})


def check_args(args) -> None:
    """Refuse flags that cannot act, and warn about those that have no effect.

    Raises:
        UserError: with the flag and the remedy.
    """
    check_flags(args, get_args_parser())


def build_optimizer(args, model):
    """AdamW with layer-wise learning rates; for a linear probe, LARS on the head alone."""
    if args.linear_probe:
        return build_lars(model.head.parameters(), args.lr, args.weight_decay)
    groups = param_groups_lrd(model, args.weight_decay, model.no_weight_decay(), args.layer_decay)
    return build_adamw(groups, args.lr, betas=(0.9, 0.999))


def main(args) -> None:
    """One fine-tuning run, or one evaluation, or predictions."""
    check_args(args)
    start_run(args)
    if args.predict:
        predict(args)
    elif args.eval:
        evaluate_checkpoint(args)
    else:
        train(args)


def complete_args(args, checkpoint: dict | None) -> None:
    """Settle what the flags leave open: the input by the checkpoint, the classes by the data.

    Raises:
        UserError: flags, data and checkpoint do not fit together.
    """
    if checkpoint is not None:
        stored, source = checkpoint.get("args", {}), args.resume or args.finetune
        adopt_input(args, get_args_parser(), stored, source, may_differ=not args.resume)
    set_mean_std(args)
    if not args.eval:
        check_cutmix(args)
        drop_default_policy(args)
        check_augmentation(args)
    parts = ["val"] if args.eval else ["train", "val"]
    args.data_path = localize(args.data_path, args.shard_cache, *parts)
    check_classes(args)
    if args.resume:
        check_trained_classes(args, checkpoint)


def build_model(args):
    """(classifier, autocast dtype, name of the attention backend) for the flags."""
    amp_dtype = choose_amp_dtype(args.amp, args.device)
    attention = get_attention_backend(args.enable_flash_attention2, args.device, amp_dtype)
    model = build_classifier(args, attention)
    if args.linear_probe:
        model.freeze_for_probe()
    return model, amp_dtype, attention.name


def train(args) -> None:
    """Prepare a run and train: epochs of training, evaluation, logging and saving."""
    checkpoint = resolve_resume(args)
    if args.replay:
        write_nothing(args)
    pretrained = read_pretrained(args.finetune) if args.finetune and not args.resume else None
    if args.linear_probe and checkpoint is None and pretrained is None:
        raise UserError("--linear_probe needs a pre-trained encoder: add --finetune FILE.")
    complete_args(args, pretrained if checkpoint is None else checkpoint)
    model, amp_dtype, attention_text = build_model(args)
    if pretrained is not None:
        load_pretrained(model, pretrained, args.finetune)
        model.init_head()
        del pretrained
    elif checkpoint is None:
        logger.info("No --finetune: training from random weights")
    prepare_output(args)
    lock = lock_output_dir(args)  # noqa: F841 (held while this function runs)
    lr_text = set_lr(args)
    model.to(args.device)
    optimizer = build_optimizer(args, model)
    loss_scaler = NativeScalerWithGradNormCount(amp_dtype, args.device.type)
    ema = ModelEmaV3(model, args.model_ema_decay) if args.model_ema else None
    state = RunState(args, model, optimizer, loss_scaler, ema)
    state.resume(checkpoint)
    del checkpoint  # as large as the model and its optimizer

    train_set, val_set = build_dataset(True, args), build_dataset(False, args)
    train_loader = build_train_loader(train_set, args)
    val_loader = build_eval_loader(val_set, args, args.dist_eval)
    state.register_dataset(train_set, len(train_loader))
    clear_output_dir(args, state.epoch)
    data_text = (
        f"{len(train_set)} training and {len(val_set)} validation images of {args.nb_classes} "
        f"classes in {args.data_path}, {len(train_loader)} batches per epoch"
    )
    summary = startup_summary(args, model, lr_text, attention_text, amp_dtype, data_text)
    log_summary(args, summary)
    write_run_json(args, summary)
    if args.compile:
        compile_model(model, args.compile)
    ddp_model = wrap_ddp(model, args.device, find_unused_parameters=False)
    install_handlers()
    with (
        training_time(args, state),
        tensorboard_writer(args, state, len(train_loader)) as writer,
        replay_step(args, state, ddp_model, train_loader),
    ):
        run_epochs(args, state, ddp_model, train_loader, val_loader, writer)


def run_epochs(args, state: RunState, ddp_model, train_loader, val_loader, writer) -> None:
    """Train, evaluate, log and save, epoch by epoch."""
    model, num_images = state.model, len(val_loader.dataset)
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("number of params (M): %.2f", num_trainable / 1e6)
    criterion, mixup_fn = build_criterion(args, train_loader.dataset.samples)
    for epoch in range(state.epoch, args.epochs):
        train_loader.set_epoch(epoch, state.iteration)
        train_stats = train_one_epoch(
            ddp_model,
            criterion,
            train_loader,
            state.optimizer,
            args.device,
            epoch,
            state.loss_scaler,
            max_norm=args.clip_grad,
            mixup_fn=mixup_fn,
            log_writer=writer,
            args=args,
            state=state,
        )
        broadcast_buffers(model)
        test_stats = evaluate(val_loader, model, args.device, state.loss_scaler.amp_dtype)
        log_accuracy(num_images, test_stats)
        if state.ema is not None:
            test_stats |= evaluate_ema(args, state, val_loader)
        if writer is not None:
            for name, value in test_stats.items():
                writer.add_scalar(f"perf/test_{name}", value, epoch)
        stats = {f"train_{k}": v for k, v in train_stats.items()}
        stats |= {f"test_{k}": v for k, v in test_stats.items()}
        log_epoch(args, stats | {"epoch": epoch, "n_parameters": num_trainable})
        state.end_epoch(test_stats[args.best_by])
        kind = "accuracy" if args.best_by == "acc1" else "mean per-class accuracy"
        logger.info("Max %s: %.2f%%", kind, state.best)


def evaluate_ema(args, state: RunState, val_loader) -> dict[str, float]:
    """The entries of `evaluate` for the moving average of the weights, named ema_*."""
    model = state.ema.module
    broadcast_buffers(model)
    stats = evaluate(val_loader, model, args.device, state.loss_scaler.amp_dtype)
    logger.info("Accuracy of the averaged weights (--model_ema): %.1f%%", stats["acc1"])
    return {f"ema_{name}": value for name, value in stats.items()}


def evaluate_checkpoint(args) -> None:
    """--eval: accuracy of the --resume checkpoint on DATA/val, and the --report."""
    if args.report:
        make_writable(args.report, "report")
    checkpoint = read_checkpoint(args.resume)
    if args.model_ema:
        checkpoint = with_ema_weights(checkpoint, args.resume)
    complete_args(args, checkpoint)
    model, amp_dtype, _ = build_model(args)
    load_model(args, model, checkpoint=checkpoint)
    model.to(args.device)
    val_set = build_dataset(False, args)
    loader = build_eval_loader(val_set, args, args.dist_eval)
    confusion = None
    if args.report:
        shape = len(val_set.classes), len(val_set.classes)
        confusion = torch.zeros(shape, dtype=torch.int64, device=args.device)
    stats = evaluate(loader, model, args.device, amp_dtype, confusion)
    log_accuracy(len(val_set), stats)
    if args.report:
        report_evaluation(args, confusion, val_set.classes)


def log_accuracy(num_images: int, stats: dict[str, float]) -> None:
    logger.info("Accuracy of the network on the %d test images: %.1f%%", num_images, stats["acc1"])


if __name__ == "__main__":
    launch(main, parse_args())
