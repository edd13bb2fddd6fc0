"""Fine-tune a pre-trained encoder as a classifier, or evaluate one (--eval --resume FILE).

torchrun --nproc_per_node=4 main_finetune.py --finetune output/pretrain/checkpoint.pth ...
"""

import argparse
import logging
from pathlib import Path

from timm.data import Mixup
from timm.layers import to_2tuple
from timm.loss import SoftTargetCrossEntropy
from torch import nn

from engine_finetune import evaluate, train_one_epoch
from util.build import build_classifier, load_trained
from util.checkpoint import load_encoder, load_model
from util.data.loaders import build_eval_loader, build_train_loader
from util.data.sources import check_same_classes, find_classes, list_images
from util.data.transforms import build_transform
from util.datasets import build_dataset
from util.distributed import broadcast_buffers, wrap_ddp
from util.eval.report import count_confusion, name_classes, predict_files, write_report
from util.io.checkpoint_file import read_checkpoint, weights_of
from util.io.errors import UserError
from util.layers.attention import get_attention_backend
from util.layers.compile import compile_blocks
from util.lr_decay import param_groups_lrd
from util.optim import (
    NativeScalerWithGradNormCount,
    build_adamw,
    build_lars,
    choose_amp_dtype,
)
from util.run import launch as run
from util.run.flags import check_shared, make_writable, prepare_output, shared_parser
from util.run.startup import log_startup_summary
from util.run.state import RunState, resolve_resume

logger = logging.getLogger(__name__)


def get_args_parser() -> argparse.ArgumentParser:
    """All flags of fine-tuning with their defaults."""
    parser = argparse.ArgumentParser(
        "main_finetune.py", description=__doc__, parents=[shared_parser()]
    )
    parser.set_defaults(epochs=50, min_lr=1e-6, warmup_epochs=5, keep_every=0)
    for add_flags in (
        add_model_flags,
        add_optim_flags,
        add_augment_flags,
        add_evaluation_flags,
        add_probe_flags,
    ):
        add_flags(parser)
    parser.set_defaults(global_pool=True)
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("classifier")
    group.add_argument("--model", default="vit_large_patch16", help="name in models_vit.py")
    group.add_argument(
        "--nb_classes", type=int, help="number of classes (default: as many as the data has)"
    )
    group.add_argument(
        "--drop_path",
        type=float,
        default=0.1,
        help="stochastic depth of the last block (default: 0.1)",
    )
    group.add_argument(
        "--global_pool", action="store_true", help="classify the mean of the patches (the default)"
    )
    group.add_argument(
        "--cls_token", action="store_false", dest="global_pool", help="classify the class token"
    )
    group.add_argument(
        "--finetune",
        default="",
        help="pre-trained checkpoint to start from: a file, an https or hf:// address",
    )


def add_optim_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fine-tuning learning rate")
    group.add_argument(
        "--layer_decay",
        type=float,
        default=0.75,
        help="factor per layer on the learning rate (default: 0.75)",
    )


def add_augment_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--color_jitter", type=float, help="strength of colour jitter; used with an empty --aa"
    )
    group.add_argument(
        "--aa",
        default="rand-m9-mstd0.5-inc1",
        help="timm's auto-augment policy, '' for none (default: rand-m9-mstd0.5-inc1)",
    )
    group.add_argument("--smoothing", type=float, default=0.1, help="of labels (default: 0.1)")
    group.add_argument(
        "--reprob", type=float, default=0.25, help="probability of random erasing (default: 0.25)"
    )
    group.add_argument(
        "--remode",
        choices=["const", "rand", "pixel"],
        default="pixel",
        help="fill of random erasing (default: pixel)",
    )
    group.add_argument("--recount", type=int, default=1, help="erased areas (default: 1)")
    group.add_argument("--resplit", action="store_true", help="no effect: kept for older commands")
    group.add_argument("--mixup", type=float, default=0, help="alpha of mixup (default: 0, off)")
    group.add_argument("--cutmix", type=float, default=0, help="alpha of cutmix (default: 0, off)")
    group.add_argument(
        "--cutmix_minmax",
        type=float,
        nargs="+",
        help="least and largest share cut, instead of --cutmix",
    )
    group.add_argument(
        "--mixup_prob", type=float, default=1.0, help="share of batches mixed (default: 1)"
    )
    group.add_argument(
        "--mixup_switch_prob",
        type=float,
        default=0.5,
        help="share of cutmix where both are on (default: 0.5)",
    )
    group.add_argument(
        "--mixup_mode", default="batch", choices=["batch", "pair", "elem"], help="(default: batch)"
    )


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval", action="store_true", help="only evaluate the --resume checkpoint")
    group.add_argument(
        "--dist_eval", action="store_true", help="split the validation set over the processes"
    )
    group.add_argument(
        "--report",
        default="",
        metavar="FOLDER",
        help="with --eval: per-class accuracy and confusion matrix as CSV and PNG files",
    )
    group.add_argument(
        "--predict",
        default="",
        metavar="FOLDER",
        help="classify the pictures below FOLDER with the --resume checkpoint; needs no labels and "
        "writes predictions.csv to the output folder",
    )


def add_probe_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("linear probe")
    group.add_argument(
        "--linear_probe",
        action="store_true",
        help="train a linear classifier on the frozen encoder of --finetune, with MAE's recipe as "
        "defaults: LARS, blr 0.1, no weight decay, 90 epochs, warm-up 10, crop and flip only, "
        "class token",
    )


LINEAR_PROBE = dict(  # arXiv 2111.06377, appendix A.1, with a batch of 16384
    blr=0.1,
    weight_decay=0.0,
    epochs=90,
    warmup_epochs=10,
    min_lr=0.0,
    drop_path=0.0,
    smoothing=0.0,
    aa="",
    reprob=0.0,
    global_pool=False,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line; --linear_probe changes the defaults of the others."""
    parser = get_args_parser()
    if parser.parse_args(argv).linear_probe:
        parser.set_defaults(**LINEAR_PROBE)
    return parser.parse_args(argv)


def build_criterion(args):
    """(loss, mixup function or None); with mixup, smoothing goes into the mixed targets."""
    if args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None:
        logger.info("Mixup is activated!")
        mixup_fn = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=args.nb_classes,
        )
        return SoftTargetCrossEntropy(), mixup_fn
    return nn.CrossEntropyLoss(label_smoothing=args.smoothing), None


def check_args(args) -> None:
    """Refuse flags that would not act.

    Raises:
        UserError: with the flag and the remedy.
    """
    check_shared(args)
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixes and args.batch_size % 2 and not args.eval:
        raise UserError(f"Mixup pairs images: --batch_size {args.batch_size} must be even.")
    if (args.eval or args.predict) and args.resume in ("", "auto"):
        raise UserError("--eval and --predict need a fine-tuned checkpoint: add --resume FILE.")
    if args.eval and args.predict:
        raise UserError("--eval wants labels and --predict has none: give one of them.")
    if args.report and not args.eval:
        raise UserError("--report describes an evaluation: add --eval --resume FILE.")
    if args.linear_probe and (mixes or args.drop_path):
        raise UserError("--linear_probe trains a frozen encoder: leave out mixup and drop path.")
    if args.linear_probe and not (args.finetune or args.resume):
        raise UserError("--linear_probe needs a pre-trained encoder: add --finetune FILE.")
    if args.cutmix_minmax is not None and not is_range(args.cutmix_minmax):
        raise UserError("--cutmix_minmax takes two shares from 0 to 1, the least first.")
    if args.mixup < 0 or args.cutmix < 0:
        raise UserError("--mixup and --cutmix are at least 0 (0: off).")
    if args.linear_probe and args.batch_size == 1:
        raise UserError("--linear_probe has BatchNorm, which needs a --batch_size of 2 or more.")
    if not 0 <= args.drop_path < 1:
        raise UserError(f"--drop_path is {args.drop_path}; it must be at least 0 and below 1.")
    if not 0 < args.layer_decay <= 1:
        raise UserError(f"--layer_decay is {args.layer_decay}; it must be above 0, at most 1.")
    if not 0 <= args.smoothing < 1:
        raise UserError(f"--smoothing is {args.smoothing}; it must be at least 0 and below 1.")
    check_augmentation(args)
    warn_idle(args)


def is_range(shares: list[float]) -> bool:
    """Whether these are two shares, the least first."""
    return len(shares) == 2 and 0 <= shares[0] <= shares[1] <= 1


def warn_idle(args) -> None:
    """Name the flags that were given and will not act, with the reason."""
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    only_tests = args.eval or args.predict
    idle = {"finetune": "--resume has all weights"} if args.resume not in ("", "auto") else {}
    if args.aa:
        idle["color_jitter"] = "--aa sets the colours (--aa '' leaves them)"
    if not mixes:
        names = ("mixup_prob", "mixup_switch_prob", "mixup_mode")
        idle |= dict.fromkeys(names, "nothing is mixed without --mixup or --cutmix")
    if args.linear_probe:
        idle["layer_decay"] = "--linear_probe trains the head alone"
    if only_tests:
        names = ("compile", "mixup", "cutmix", "cutmix_minmax", "layer_decay", "clip_grad")
        idle |= dict.fromkeys(names, "nothing is trained")
    if args.predict:
        names = ("input_size", "patch_size", "in_chans", "mean", "std", "skip_bad_images")
        idle |= dict.fromkeys(names, "--predict takes all pictures, as the checkpoint says")
    parser = get_args_parser()
    for name, reason in idle.items():
        default = parser.get_default(name)
        if getattr(args, name) != default and (default is not None or getattr(args, name)):
            logger.warning("--%s does nothing here: %s", name, reason)


def check_augmentation(args) -> None:
    """Refuse what cannot be applied to the pictures.

    Raises:
        UserError: --aa is no policy, or wants colours where there are none.
    """
    if args.eval or args.predict:
        return
    if args.in_chans != 3:
        if args.aa == "rand-m9-mstd0.5-inc1":
            args.aa = ""
            logger.info("Without --aa: it works on 3 channels")
        if args.aa or args.color_jitter:
            raise UserError("--aa and --color_jitter work on 3 channels; leave them out (--aa '').")
    try:
        build_transform(True, args)
    except AssertionError as error:  # so timm says it
        raise UserError(
            f"--aa {args.aa} is no policy of timm; rand-m9-mstd0.5-inc1, augmix-m5-w4-d2 and "
            "original-mstd0.5 are, '' is none."
        ) from error


def check_classes(args) -> None:
    """Compare the class folders with each other and with --nb_classes, which is set from them.

    Looks at folder names only, so it takes no longer for a million images.

    Raises:
        UserError: training and validation classes differ, or --nb_classes is not their number.
    """
    splits = ["val"] if args.eval else ["train", "val"]
    classes, *others = (find_classes(Path(args.data_path, split)) for split in splits)
    for other in others:
        check_same_classes(args.data_path, classes, other)
    if args.nb_classes is None:
        args.nb_classes = len(classes)
    elif args.nb_classes != len(classes):
        raise UserError(
            f"--nb_classes is {args.nb_classes} but {args.data_path} has {len(classes)} class "
            "folders; correct the flag or leave it out."
        )


def main(args) -> None:
    """One fine-tuning run, or one evaluation."""
    check_args(args)
    run.start_run(args)
    if args.predict:
        predict(args)
        return
    check_classes(args)
    amp_dtype = choose_amp_dtype(args.amp, args.device)
    attention_backend = get_attention_backend(args.enable_flash_attention2, args.device, amp_dtype)
    model = build_classifier(args, attention_backend)
    if args.linear_probe:
        model.freeze_for_probe()
    if args.eval:
        evaluate_checkpoint(args, model)
        return
    newest = resolve_resume(args)
    if args.finetune and not args.resume:
        start_from_pretrained(model, args.finetune)
    prepare_output(args)
    lr_text = run.set_lr(args)
    model.to(args.device)
    optimizer = build_optimizer(args, model)
    loss_scaler = NativeScalerWithGradNormCount(amp_dtype, args.device.type)
    state = RunState(args, model, optimizer, loss_scaler)
    state.resume(newest)
    del newest  # as large as the model and its optimizer

    train_set, val_set = build_dataset(True, args), build_dataset(False, args)
    train_loader = build_train_loader(train_set, args)
    val_loader = build_eval_loader(val_set, args, args.dist_eval)
    state.register_dataset(train_set)
    data_text = (
        f"{len(train_set)} training and {len(val_set)} validation images of {args.nb_classes} "
        f"classes in {args.data_path}, {len(train_loader)} batches per epoch"
    )
    log_startup_summary(args, model, lr_text, attention_backend.name, data_text)
    train(args, state, train_loader, val_loader)


def train(args, state: RunState, train_loader, val_loader) -> None:
    """The epochs: train, evaluate, log, save."""
    model = state.model
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("number of params (M): %.2f", num_trainable / 1e6)
    criterion, mixup_fn = build_criterion(args)
    if args.compile:
        compile_blocks(model)
    ddp_model = wrap_ddp(model, args.device, find_unused_parameters=False)
    with run.recording(args, state, len(train_loader)) as writer:
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
                args.clip_grad,
                mixup_fn,
                writer,
                args,
                state,
            )
            broadcast_buffers(model)
            test_stats = evaluate(val_loader, model, args.device, args.amp)
            report_accuracy(len(val_loader.dataset), test_stats)
            if writer is not None:
                for name in ("acc1", "acc5", "loss"):
                    writer.add_scalar(f"perf/test_{name}", test_stats[name], epoch)
            stats = {f"train_{k}": v for k, v in train_stats.items()}
            stats |= {f"test_{k}": v for k, v in test_stats.items()}
            run.log_epoch(args, stats | {"epoch": epoch, "n_parameters": num_trainable})
            state.end_epoch(test_stats["acc1"])
            logger.info("Max accuracy: %.2f%%", state.best)


def build_optimizer(args, model):
    """AdamW with layer-wise learning rates; for a linear probe LARS on the head alone."""
    if args.linear_probe:
        return build_lars(model.head.parameters(), args.lr, args.weight_decay)
    groups = param_groups_lrd(model, args.weight_decay, model.no_weight_decay(), args.layer_decay)
    return build_adamw(groups, args.lr, betas=(0.9, 0.999))


def evaluate_checkpoint(args, model) -> None:
    """--eval: accuracy of the --resume checkpoint on DATA/val, and the --report."""
    if args.report:
        make_writable(args.report, "report")
    checkpoint = load_model(args, model)
    model.to(args.device)
    val_set = build_dataset(False, args)
    trained_on = checkpoint.get("class_names") or val_set.classes
    if trained_on != val_set.classes:
        odd = sorted(set(trained_on) ^ set(val_set.classes))
        raise UserError(
            f"{args.resume} was trained on other classes than {args.data_path}/val has (such as "
            f"{', '.join(odd[:3])}); evaluate on the data set it belongs to."
        )
    loader = build_eval_loader(val_set, args, args.dist_eval)
    stats = evaluate(loader, model, args.device, args.amp)
    report_accuracy(len(val_set), stats)
    if args.report:
        split = args.dist_eval
        matrix = count_confusion(loader, model, args.nb_classes, args.device, args.amp, split)
        if args.rank == 0:
            for note in write_report(args.report, matrix, val_set.classes):
                logger.info("%s", note)
            logger.info("Report in %s", args.report)


def predict(args) -> None:
    """--predict: classes of unlabelled pictures, from all that the checkpoint says of itself."""
    model, trained = load_trained(args.resume, model=args.model)
    if not hasattr(trained, "nb_classes"):
        raise UserError(
            f"{args.resume} is a pre-trained model, which knows no classes; --predict needs one "
            "that was fine-tuned."
        )
    for name in ("device", "amp", "batch_size", "num_workers", "pin_mem", "prefetch"):
        setattr(trained, name, getattr(args, name))
    prepare_output(args)
    out = Path(args.output_dir or ".", "predictions.csv")
    files = [path for path, _ in list_images(args.predict).samples]  # shards: on every rank
    if args.rank == 0:
        classes = name_classes(trained, trained.nb_classes)
        predict_files(model.to(args.device), files, classes, trained, out)
        logger.info("Predictions in %s", out)


def start_from_pretrained(model, source: str) -> None:
    """Load an encoder and give the classifier a small random head, also where the file has one."""
    checkpoint = read_checkpoint(source)
    logger.info("Load pre-trained checkpoint from: %s", source)
    args = checkpoint.get("args", {})
    size, patch_size = to_2tuple(args.get("input_size") or 0), model.patch_embed.patch_size
    grid = (size[0] // patch_size, size[1] // patch_size) if all(size) else None
    weights = weights_of(checkpoint, source)
    table = weights.get("pos_embed")
    if grid and table is not None and grid[0] * grid[1] != table.shape[1] - 1:
        grid = None  # the public MAE baseline noted --input_size without using it: a square
    for name in [name for name in weights if name.startswith("head.")]:
        logger.info("Removing key %s from pretrained checkpoint", name)
        del weights[name]
    load_encoder(model, weights, grid)
    model.init_head()


def report_accuracy(num_images: int, stats: dict[str, float]) -> None:
    logger.info("Accuracy of the network on the %d test images: %.1f%%", num_images, stats["acc1"])


if __name__ == "__main__":
    run.run(main, parse_args())
