"""Being asked to stop: SIGTERM, SIGUSR1 (SLURM's warning) and Ctrl-C end training after an update.

The first signal is noted, the second one ends the process at once. Outside of training they end it
at once, as in any program.
"""

import multiprocessing
import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_INTERRUPTED = 75  # "try again later" of sysexits.h: the run was saved and is not finished

received: list[int] = []
before: dict[int, object] = {}  # handlers that were there when watching began


class Interrupted(SystemExit):
    """The run was asked to stop, has saved its state and ends with EXIT_INTERRUPTED."""

    def __init__(self):
        super().__init__(EXIT_INTERRUPTED)


def note(number: int, frame) -> None:
    """Handler: remember the signal; leave the next one to the system."""
    received.append(number)
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_DFL)


def watch() -> None:
    """Note stop signals from now on."""
    received.clear()
    for number in STOP_SIGNALS:
        before[number] = signal.signal(number, note)


def unwatch() -> None:
    """Leave stop signals to whom they belonged before."""
    for number, handler in before.items():
        signal.signal(number, handler)
    before.clear()


def stop_requested() -> bool:
    """Whether this process has been asked to stop."""
    return bool(received)


def ignore_signals_in_worker(worker_id: int) -> None:
    """Loader processes get the signals of their group too; they must outlive the save."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def kill_workers() -> None:
    """End the loader processes at the end of a run; they ignore the polite way."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call this a crash
    for worker in multiprocessing.active_children():
        worker.kill()
