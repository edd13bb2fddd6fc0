"""One process of a training job, as submitit runs it for tools.submit; needs no torch itself."""

import os
import signal
import subprocess
import time

from util.run.signals import EXIT_INTERRUPTED


class Training:
    """One process of the job: runs the script as a child that submitit's signal does not reach."""

    def __init__(self, command: list[str]):
        self.command = command
        self.pid: int | None = None

    def __call__(self) -> int:
        """Exit status of the script: 0, or EXIT_INTERRUPTED where it saved and stopped.

        Raises:
            RuntimeError: the script failed.
        """
        from submitit.helpers import TorchDistributedEnvironment

        environment = TorchDistributedEnvironment()
        environment.export(set_cuda_visible_devices=False, overwrite=True)
        if environment.world_size == environment.local_world_size:
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        # SLURM signals all processes of a job; only `checkpoint` may stop the script.
        child = subprocess.Popen(self.command, preexec_fn=ignore_usr2)
        self.pid = child.pid
        while child.poll() is None:  # submitit's handler, and with it `checkpoint`, runs in between
            time.sleep(0.5)
        if child.returncode not in (0, EXIT_INTERRUPTED):
            raise RuntimeError(f"{self.command} ended with status {child.returncode}")
        return child.returncode

    def checkpoint(self):
        """Let the script save and stop; submitit then queues what this returns."""
        from submitit.helpers import DelayedSubmission

        if self.pid is not None:
            os.kill(self.pid, signal.SIGUSR1)
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Training(self.command))


def ignore_usr2() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
