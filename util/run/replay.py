"""--replay EPOCH ITERATION: take one step of a run once more, and find what is not finite in it.

The run resumes from its checkpoint and takes the same steps again, since the order of the images,
their augmentation and the random states depend on the checkpoint and the flags alone. It writes
nothing, and ends after the step.
"""

import contextlib
import itertools
import logging
import warnings
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from util.distributed import all_reduce_max
from util.io.errors import UserError

logger = logging.getLogger(__name__)


class Replayed(SystemExit):
    """The step was replayed and what is not finite was named: the end of the process."""


def write_nothing(args) -> None:
    """Leave the output of the run that is replayed as it is."""
    args.output_dir = args.log_dir = ""
    args.save_every_minutes = 0
    args.log_images = args.knn_every = 0


@contextlib.contextmanager
def replay_step(args, state, ddp_model: nn.Module, loader):
    """Watch the step of --replay within the block and report on it; nothing without --replay.

    Raises:
        UserError: the step lies before the checkpoint or does not exist, or all of it is finite.
        Replayed: after the report, on every rank.
    """
    if not args.replay:
        yield
        return
    epoch, iteration = args.replay
    first = (epoch, iteration - iteration % args.accum_iter)
    if epoch >= args.epochs or iteration >= len(loader):
        raise UserError(
            f"--replay {epoch} {iteration}: there are {args.epochs} epochs of {len(loader)} "
            "iterations, both counted from 0."
        )
    if first < (state.epoch, state.iteration):
        raise UserError(
            f"--replay {epoch} {iteration} lies before {state.last_saved}; give an earlier "
            "checkpoint with --resume."
        )
    logger.info("Replay: training up to epoch %d, iteration %d; nothing is written", *first)
    state.replay = watch = StepWatch(args, state.model, ddp_model, loader)
    try:
        with watch.stack:
            yield
    except RuntimeError as error:
        if not watch.is_on or "returned nan values" not in str(error):
            raise
        watch.note(f"the backward of {watch.active[-1]} gives NaN: {str(error).splitlines()[0]}")
        watch.finish()


class StepWatch:
    """Looks for the first value that is not finite: images, weights, outputs, gradients."""

    def __init__(self, args, model: nn.Module, ddp_model: nn.Module, loader):
        self.args = args
        self.model, self.ddp_model, self.loader = model, ddp_model, loader
        self.is_on = False
        self.finding = ""
        self.active = ["the loss"]  # modules whose backward has begun and not ended
        self.stack = contextlib.ExitStack()  # undoes what `start` does

    def before(self, epoch: int, iteration: int, imgs: Tensor) -> None:
        """To be called before the forward pass of every iteration."""
        wanted, accum_iter = self.args.replay, self.args.accum_iter
        if epoch != wanted[0] or iteration // accum_iter != wanted[1] // accum_iter:
            return
        if not self.is_on:
            self.start()
        finite = imgs.isfinite().flatten(1).all(dim=1).tolist()
        if not all(finite):
            batches = self.loader.loader.batch_sampler
            batch = next(itertools.islice(batches, iteration - batches.first_batch, None))
            _, index = batch[finite.index(False)]
            self.note(f"the image {self.loader.dataset.samples[index][0]}, after its transform")

    def start(self) -> None:
        """Check the weights, then hook every module."""
        self.is_on = True
        for name, value in self.model.state_dict().items():
            if not is_finite(value):
                self.note(f"the weight {name}, before the step")
        for name, module in self.model.named_modules():
            text = f"{name or 'the model'} ({type(module).__name__})"
            for hook in (
                module.register_forward_hook(partial(self.after_forward, text)),
                module.register_full_backward_pre_hook(partial(self.before_backward, text)),
                module.register_full_backward_hook(partial(self.after_backward, text)),
            ):
                self.stack.callback(hook.remove)
        if isinstance(self.ddp_model, DistributedDataParallel):
            # Each rank looks at its own gradients, and none waits for one that has failed.
            self.ddp_model.require_backward_grad_sync = False
        self.stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # images need none
        self.stack.enter_context(torch.autograd.set_detect_anomaly(True))
        self.stack.enter_context(torch.compiler.set_stance("force_eager"))  # it runs no hooks

    def note(self, finding: str) -> None:
        """Keep the first finding."""
        self.finding = self.finding or finding

    def after_forward(self, name: str, module, inputs, output) -> None:
        if not is_finite(output):
            self.note(f"the output of {name}")

    def before_backward(self, name: str, module, grad_output) -> None:
        self.active.append(name)
        if not is_finite(grad_output):
            self.note(f"the gradient of the output of {name}")

    def after_backward(self, name: str, module, grad_input, grad_output) -> None:
        if name in self.active:
            self.active.remove(name)
        if not is_finite(grad_input):
            self.note(f"the gradient of the input of {name}")

    def after(self, loss: Tensor, is_step: bool) -> None:
        """To be called after the backward pass of every iteration."""
        if not self.is_on:
            return
        for name, param in self.model.named_parameters():
            if param.grad is not None and not is_finite(param.grad):
                self.note(f"the gradient of the weight {name}")
        if not is_finite(loss):
            self.note("the loss")
        if is_step:
            self.finish()

    def finish(self) -> None:
        """Report, on every rank.

        Raises:
            Replayed: something was not finite.
            UserError: everything was finite on all ranks.
        """
        epoch, iteration = self.args.replay
        where = f"epoch {epoch}, iteration {iteration}"
        if self.finding:
            where_and_seed = f"{where}, rank {self.args.rank}, seed {self.args.seed}"
            logger.warning("Replay: %s: not finite first: %s", where_and_seed, self.finding)
        (is_found,) = all_reduce_max([bool(self.finding)], self.args.device)
        if is_found:
            raise Replayed(0)
        raise UserError(
            f"--replay: {where} is finite in every output and gradient; give the checkpoint, "
            "flags, number of ranks and device of the run in which it was not."
        )


def is_finite(value) -> bool:
    """Whether all floating-point tensors in a tensor or nested sequence are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    return not isinstance(value, (list, tuple)) or all(map(is_finite, value))
