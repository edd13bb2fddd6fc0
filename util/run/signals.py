"""Stop signals: SIGTERM, SIGUSR1 (SLURM's warning) and Ctrl-C end training after a step.

The first signal is noted, the second one ends the process at once. Outside of training, signals
act as in any program.
"""

import multiprocessing
import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_INTERRUPTED = 75  # "try again later" of sysexits.h: the run was saved and is not finished

received: list[int] = []
previous_handlers: dict[int, object] = {}


class Interrupted(SystemExit):
    """The run was asked to stop, has saved its state and exits with EXIT_INTERRUPTED."""

    def __init__(self):
        super().__init__(EXIT_INTERRUPTED)


def note_signal(number: int, frame) -> None:
    """Handler: remember the signal; the next one has its default effect."""
    received.append(number)
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_DFL)


def install_handlers() -> None:
    """Note stop signals from now on."""
    received.clear()
    for number in STOP_SIGNALS:
        previous_handlers[number] = signal.signal(number, note_signal)


def restore_handlers() -> None:
    """Restore the handlers from before install_handlers."""
    for number, handler in previous_handlers.items():
        signal.signal(number, handler)
    previous_handlers.clear()


def stop_requested() -> bool:
    """Whether this process has received a stop signal."""
    return bool(received)


def ignore_signals_in_worker(worker_id: int) -> None:
    """worker_init_fn: signals sent to the group reach workers too; they must outlive the save."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def kill_workers() -> None:
    """Kill the DataLoader workers at the end of a run; they ignore stop signals."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call this a crash
    for worker in multiprocessing.active_children():
        worker.kill()
