"""Where a run is: its epoch and iteration, its best result, and the data it goes through."""

import logging
from pathlib import Path

from util.distributed import all_reduce_max, get_rank
from util.io.errors import CheckpointError, UserError
from util.rng import set_random_state

logger = logging.getLogger(__name__)

ORDER_FLAGS = ("world_size", "batch_size", "accum_iter", "seed")  # decide the order of images
STATE_KEYS = {*ORDER_FLAGS, "iteration", "meters", "best", "random"}


class Position:
    """Position of a run, as it is saved and restored."""

    def __init__(self, args):
        self.args = args
        self.class_names: list[str] = []
        self.num_images: int | None = None  # of the training data
        self.epoch = args.start_epoch
        self.iteration = 0  # the next one inside the epoch
        self.meters: dict[str, list[float]] = {}  # of the epoch so far: [total, count]
        self.best: float | None = None  # best validation accuracy so far, by --best_by
        self.last_saved = ""  # file and position of this run's last checkpoint, for messages

    def describe(self, path: str | Path) -> str:
        """A checkpoint of the current position, in words."""
        return f"{path} (resumes at epoch {self.epoch}, iteration {self.iteration})"

    def check_agreement(self) -> None:
        """Raises CheckpointError, on every rank, unless all ranks are at the same position."""
        position = [self.epoch, self.iteration]
        bounds = all_reduce_max(position + [-x for x in position], self.args.device)
        if bounds[:2] != [-x for x in bounds[2:]]:
            raise CheckpointError(
                f"The ranks found different checkpoints: rank {get_rank()} would resume from "
                f"{self.last_saved or 'none'}; --output_dir must be a folder that all hosts share."
            )

    def restore_position(self, state: dict | None) -> None:
        """Continue inside the epoch, if images come in the same order as in the saved run."""
        if not isinstance(state, dict) or not STATE_KEYS <= state.keys():
            logger.info("No position or random states in the file: resuming at the next epoch")
            return
        best_by = state.get("best_by", "acc1")
        if state["best"] is not None and best_by != self.args.best_by:
            raise UserError(
                f"--best_by is {self.args.best_by}, but {self.args.resume} keeps the best by "
                f"{best_by}; use that."
            )
        self.best = state["best"]
        self.num_images = state.get("num_images")
        changed = [
            f"{name} {state[name]} -> {getattr(self.args, name)}"
            for name in ORDER_FLAGS
            if state[name] != getattr(self.args, name)
        ]
        if not changed:
            self.iteration, self.meters = state["iteration"], state["meters"]
            if len(state["random"]) != self.args.world_size:
                raise CheckpointError(
                    f"{self.args.resume} is not a valid checkpoint: state.random has "
                    f"{len(state['random'])} entries for {self.args.world_size} ranks; use another "
                    "copy."
                )
            set_random_state(state["random"][get_rank()])
            where = f", iteration {self.iteration}" if self.iteration else ""
            logger.info("Resuming at epoch %d%s, exactly where it stopped", self.epoch, where)
        elif state["iteration"]:
            logger.warning(
                "%s: the interrupted epoch %d starts over with another order of images",
                *(", ".join(changed), self.epoch),
            )
        else:
            logger.warning("%s: the order of images changes from here on", ", ".join(changed))

    def register_dataset(self, dataset, num_iterations: int) -> None:
        """Note the training data; a position inside an epoch is dropped if the data changed.

        Args:
            num_iterations: of one epoch.

        Raises:
            CheckpointError: the position lies beyond the epoch's end.
        """
        self.class_names = dataset.classes
        if self.iteration and self.num_images not in (None, len(dataset)):
            logger.warning(
                "The data set has %d images and had %d: the interrupted epoch %d starts over",
                *(len(dataset), self.num_images, self.epoch),
            )
            self.iteration, self.meters = 0, {}
        if self.iteration > num_iterations:
            raise CheckpointError(
                f"{self.args.resume} is not a valid checkpoint: state.iteration is "
                f"{self.iteration}, an epoch has {num_iterations}; use another copy."
            )
        self.num_images = len(dataset)

    def restore_meters(self, metrics) -> int:
        """Fill the meters with the epoch so far; returns how many of its steps were skipped."""
        for name, (total, count) in self.meters.items():
            if name != "skipped":
                metrics.restore(name, total, count)
        return int(self.meters.get("skipped", [0, 0])[0])

    def content(self, random_states: list[dict]) -> dict:
        """The `state` entry of a checkpoint; random_states are those of all ranks."""
        return {
            **{name: getattr(self.args, name) for name in ORDER_FLAGS},
            "iteration": self.iteration,
            "meters": self.meters,
            "best": self.best,
            "num_images": self.num_images,
            "random": random_states,
            "best_by": getattr(self.args, "best_by", None),
        }
