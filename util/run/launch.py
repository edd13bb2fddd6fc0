"""Start a command: logging, and how it ends when something is wrong."""

import datetime
import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable

from util import distributed
from util.io.errors import UserError
from util.run import signals

logger = logging.getLogger(__name__)


class ClockFormatter(logging.Formatter):
    """`[HH:MM:SS.ffffff] message`, as users of the MAE family know it."""

    def format(self, record: logging.LogRecord) -> str:
        clock = datetime.datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"[{clock}] {record.getMessage()}{trace}"


def start_logging(rank: int = 0) -> None:
    """Log to standard output; ranks other than 0 log warnings only."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(ClockFormatter())
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler], force=True
    )


def launch(main: Callable, args) -> None:
    """Run main(args). A UserError ends it with one line and exit status 1.

    Anything else is a bug and keeps its traceback; CROSSMAE_TRACEBACK=1 shows it for user errors
    too.
    """
    # The rank as the environment has it: the process group does not exist yet.
    start_logging(int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))))
    gc.freeze()  # what was imported stays: collections take no time for it, and the exit 1 s less
    try:
        main(args)
    except KeyboardInterrupt:
        logger.error("Error: interrupted")
        sys.exit(128 + signal.SIGINT)
    except (UserError, RuntimeError) as error:
        is_user = isinstance(error, UserError)
        message = str(error) if is_user else distributed.explain_lost_peer(error)
        if os.environ.get("CROSSMAE_TRACEBACK") or message is None:
            raise
        logger.error("Error: %s", message)
        sys.exit(1)
    finally:
        signals.kill_workers()
        free_frames(sys.exc_info()[1])
        distributed.close()
        signals.restore_handlers()  # last: other ranks' signals may arrive while this one ends


def free_frames(error: BaseException | None) -> None:
    """Release what the frames of an error hold, the model in DDP among it.

    Left to the end of the interpreter, the threads of its process group were seen to hang there
    (PyTorch 2.11, one exit in five).
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    gc.collect()
