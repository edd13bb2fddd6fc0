"""Where a run is: all that decides its next step besides the weights, saved and restored.

A run that is killed and goes on with --resume auto takes the same steps as one that never stopped:
bit for bit on a CPU, up to the order of the GPU's own sums on a GPU.
"""

import datetime
import json
import logging
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from util.checkpoint import load_model, save_model
from util.distributed import all_reduce_max, get_rank, get_world_size, is_main_process
from util.io.checkpoint_file import read_checkpoint
from util.io.errors import CheckpointError, UserError
from util.io.files import atomic_write, remove_temporary_files
from util.rng import get_random_state, set_random_state
from util.run import signals

logger = logging.getLogger(__name__)

CHECK_EVERY = 20  # updates between looks at signals and clock; on a GPU each look costs a wait
LAYOUT = ("world_size", "batch_size", "accum_iter", "seed")  # what the order of images depends on
POSITION = {*LAYOUT, "iteration", "meters", "best", "random"}  # what a state has


class RunState:
    """Position, best result and random numbers of a run, and when they are written to disk."""

    def __init__(self, args, model_without_ddp, optimizer, loss_scaler):
        self.args = args
        self.model = model_without_ddp
        self.optimizer = optimizer
        self.loss_scaler = loss_scaler
        self.class_names: list[str] = []
        self.num_images: int | None = None  # of the training data
        self.epoch = args.start_epoch
        self.iteration = 0  # next one inside the epoch
        self.is_first = True  # no epoch was finished by this process
        self.meters: dict[str, list[float]] = {}  # of the epoch so far: [total, count]
        self.best: float | None = None  # best acc1 so far
        self.last_save = time.monotonic()
        self.last_saved = ""  # file and position of the last checkpoint of this run, in words
        self.writer = None  # TensorBoard's, of the epoch that runs

    def resume(self, checkpoint: dict | None = None) -> None:
        """Take up the run in args.resume, if there is one.

        Args:
            checkpoint: what that file holds, where resolve_resume has read it.

        Raises:
            CheckpointError: the file cannot be read or fits another model.
        """
        if self.args.resume:
            checkpoint = load_model(
                self.args, self.model, self.optimizer, self.loss_scaler, checkpoint
            )
            self.epoch = self.args.start_epoch
            self.restore_position(checkpoint.get("state"))
            self.last_saved = self.describe(self.args.resume)
        self.check_agreement()

    def describe(self, path: str | Path) -> str:
        """A checkpoint of the present position, in words."""
        where = f"epoch {self.epoch}, iteration {self.iteration}"
        return f"{path}, which goes on at {where}"

    def check_agreement(self) -> None:
        """Raises CheckpointError, on every process, unless all of them stand at the same place."""
        place = [self.epoch, self.iteration]
        ends = all_reduce_max(place + [-x for x in place], self.args.device)
        if ends[:2] != [-x for x in ends[2:]]:
            raise CheckpointError(
                f"The processes found different checkpoints: rank {get_rank()} would go on with "
                f"{self.last_saved or 'a fresh start'}; --output_dir must be a folder that all "
                "hosts share."
            )

    def restore_position(self, state: dict | None) -> None:
        """Go on inside the epoch, if images come in the order of the run that wrote the state."""
        if not isinstance(state, dict) or not POSITION <= state.keys():
            logger.info("The file holds no position and random states; its next epoch starts fresh")
            return
        self.best = state["best"]
        self.num_images = state.get("num_images")
        changed = [
            f"{name} {state[name]} -> {getattr(self.args, name)}"
            for name in LAYOUT
            if state[name] != getattr(self.args, name)
        ]
        if not changed:
            self.iteration, self.meters = state["iteration"], state["meters"]
            set_random_state(state["random"][get_rank()])
            where = f", iteration {self.iteration}" if self.iteration else ""
            logger.info("Going on at epoch %d%s, exactly where it stopped", self.epoch, where)
        elif state["iteration"]:
            logger.warning(
                "%s: epoch %d, which was begun, starts over in another order of images",
                *(", ".join(changed), self.epoch),
            )
        else:
            logger.warning("%s: the order of images changes from here on", ", ".join(changed))

    def register_dataset(self, dataset) -> None:
        """Note the training data; in other data than before, a position has no meaning."""
        self.class_names = dataset.classes
        if self.iteration and self.num_images not in (None, len(dataset)):
            logger.warning(
                "The data set has %d images and had %d: epoch %d, which was begun, starts over",
                *(len(dataset), self.num_images, self.epoch),
            )
            self.iteration, self.meters = 0, {}
        self.num_images = len(dataset)

    def load_meters(self, metrics) -> int:
        """Give the meters what the epoch had so far; returns how many steps were skipped in it."""
        for name, (total, count) in self.meters.items():
            if name != "skipped":
                metrics.restore(name, total, count)
        return int(self.meters.get("skipped", [0, 0])[0])

    def after_update(self, iteration: int, log) -> None:
        """Save in mid-epoch where it is due; stop where it was asked for.

        Args:
            iteration: the next one of this epoch.
            log: the epoch's TrainLog.

        Raises:
            Interrupted: on every process, after saving, when any of them got a stop signal.
        """
        args = self.args
        self.writer = log.writer
        if args.device.type == "cuda" and iteration // args.accum_iter % CHECK_EVERY:
            return
        minutes = (time.monotonic() - self.last_save) / 60
        is_due = is_main_process() and 0 < args.save_every_minutes <= minutes
        is_due, is_stopping = all_reduce_max([is_due, signals.stop_requested()], args.device)
        if not (is_due or is_stopping):
            return
        log.read()  # nothing is saved whose loss nobody has looked at
        self.iteration = iteration
        self.meters = {name: [m.total, m.count] for name, m in log.metrics.meters.items()}
        self.meters["skipped"] = [log.skipped, 1]
        if args.output_dir:
            self.save()
            logger.info("Saved at epoch %d, iteration %d", self.epoch, iteration)
        if is_stopping:
            self.stop()

    def end_epoch(self, acc1: float | None = None) -> None:
        """Move on to the next epoch, and write what is due.

        Args:
            acc1: accuracy of fine-tuning after this epoch; the best one is kept in a file of its
                own.

        Raises:
            Interrupted: on every process, after saving, when any of them got a stop signal.
        """
        args, epoch = self.args, self.epoch
        self.epoch, self.iteration, self.meters = epoch + 1, 0, {}
        self.is_first = False
        is_best = acc1 is not None and (self.best is None or acc1 >= self.best)
        if is_best:
            self.best = acc1
        keeps = args.keep_every > 0 and epoch % args.keep_every == 0
        is_last = self.epoch == args.epochs
        (is_stopping,) = all_reduce_max([signals.stop_requested()], args.device)
        is_due = keeps or is_best or is_last or is_stopping or epoch % args.save_every == 0
        if args.output_dir and is_due:
            links = [f"checkpoint-{epoch}.pth"] * keeps + ["checkpoint-best.pth"] * is_best
            self.save(links)
            if keeps and is_main_process():
                remove_old(Path(args.output_dir), args.keep_last, epoch)
        if is_stopping and not is_last:
            self.stop()

    def stop(self) -> None:
        """Raises Interrupted, after saying where the run goes on."""
        if self.args.output_dir:
            logger.info("Stopped by a signal; --resume auto goes on from here")
        else:
            logger.info("Stopped by a signal; without --output_dir nothing was saved")
        raise signals.Interrupted

    def save(self, links: list[str] = ()) -> None:
        """Write checkpoint.pth on rank 0, with the random states of all ranks.

        Args:
            links: further names for the same file.

        Raises:
            UserError: on every rank, if rank 0 could not write.
        """
        own = get_random_state(self.args.device)
        states = [own]
        if get_world_size() > 1:
            states = [None] * get_world_size()
            dist.all_gather_object(states, own)
        problem = None
        if is_main_process():
            position = {name: getattr(self.args, name) for name in LAYOUT}
            position |= {"iteration": self.iteration, "meters": self.meters, "best": self.best}
            position["num_images"] = self.num_images
            extra = {
                "state": {**position, "random": states},
                "class_names": self.class_names,
                "versions": {"torch": str(torch.__version__), "numpy": np.__version__},
            }
            try:
                if self.writer is not None:
                    flush(self.writer)
                save_model(
                    self.args,
                    self.epoch - 1,
                    self.model,
                    self.optimizer,
                    self.loss_scaler,
                    extra,
                    links=links,
                )
            except UserError as error:
                problem = error
        (failed,) = all_reduce_max([problem is not None], self.args.device)
        if failed:
            raise problem or UserError("Rank 0 could not write the checkpoint; see its message.")
        self.last_save = time.monotonic()
        self.last_saved = self.describe(Path(self.args.output_dir, "checkpoint.pth"))


def flush(writer) -> None:
    """Bring TensorBoard's file to the disk: no gap in the curve where a killed run went on.

    Raises:
        UserError: it cannot be written; says where.
    """
    try:
        writer.flush()
    except OSError as error:
        raise UserError(
            f"Cannot write TensorBoard's file in {writer.log_dir} ({error.strerror}); the "
            "checkpoint is as it was."
        ) from error


def resolve_resume(args) -> dict | None:
    """Put the file that `--resume auto` means into args.resume; what it holds.

    That is the newest complete checkpoint in the output folder, or '' and None without one.
    """
    if args.resume != "auto":
        return None
    args.resume, checkpoint = find_newest(Path(args.output_dir))
    if not args.resume:
        logger.info("No checkpoint in %s yet: starting fresh", args.output_dir)
    return checkpoint


def find_newest(folder: Path) -> tuple[str, dict | None]:
    """The newest complete checkpoint of a folder, path and content; ('', None) if there is none.

    Damaged ones are named.
    """
    files = [p for p in folder.glob("checkpoint*.pth") if p.is_file()]
    for path in sorted(files, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        try:
            return str(path), read_checkpoint(path)
        except CheckpointError as error:
            logger.warning("Passed over: %s", error)
    return "", None


def remove_old(folder: Path, keep_last: int, epoch: int) -> None:
    """Delete all but the last `keep_last` of checkpoint-EPOCH.pth; 0 keeps all.

    Args:
        epoch: the present one; files of later epochs are another run's and stay.
    """
    names = [p.stem.removeprefix("checkpoint-") for p in folder.glob("checkpoint-*.pth")]
    epochs = sorted(int(name) for name in names if name.isdecimal() and int(name) <= epoch)
    for number in epochs[:-keep_last] if keep_last else []:
        (folder / f"checkpoint-{number}.pth").unlink(missing_ok=True)


def clean_output_dir(args, first_epoch: int) -> None:
    """Clear the output folder of what an interrupted run left: half-written files, lines of log.txt
    about epochs that will be run again. Where another run was, its log is laid aside.
    """
    folder = Path(args.output_dir)
    remove_temporary_files(folder)
    goes_on = bool(args.resume) and Path(args.resume).resolve().parent == folder.resolve()
    if not goes_on and (folder / "checkpoint.pth").exists():
        logger.warning(
            "%s holds a run already; this one replaces its checkpoint.pth (--resume auto goes on)",
            folder,
        )
    log = folder / "log.txt"
    if not goes_on and log.exists():
        ended = datetime.datetime.fromtimestamp(log.stat().st_mtime)
        aside = log.with_name(f"log-until-{ended:%Y%m%d-%H%M%S}.txt")
        log.replace(aside)
        logger.warning("The log of the run before this one is %s now", aside)
    elif log.exists():
        lines = log.read_text(encoding="utf-8").splitlines()
        kept = [
            line for line in lines if line.endswith("}") and json.loads(line)["epoch"] < first_epoch
        ]
        if kept != lines:
            with atomic_write(log) as tmp_path:
                tmp_path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
