"""Submit a training script to SLURM through submitit (pip install submitit).

    python -m tools.submit --nodes 2 --ngpus 8 --timeout 1440 --job_dir DIR main_pretrain.py FLAGS

Every GPU gets one process. Before the time limit or a preemption the script saves and the job
queues again, to continue with --resume auto, which is added here. DIR gets the logs of the job and,
unless FLAGS name another --output_dir, the output of the run.
"""

import argparse
import importlib
import importlib.util
import logging
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run by its path

from util.io.errors import UserError
from util.run.checks import check_ranges
from util.run.flags import FlagParser, add_flag, parse_flags
from util.run.job import Training
from util.run.launch import launch
from util.run.output_dir import make_writable

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("main_pretrain.py", "main_finetune.py")
RANGES = {
    **dict.fromkeys(("nodes", "cpus_per_task", "timeout", "max_timeouts"), "[1, 1000000]"),
    "ngpus": "[0, 1024]",
    "signal_delay": "[1, 86400]",
}


def get_args_parser() -> FlagParser:
    parser = FlagParser("python -m tools.submit", description=__doc__.splitlines()[0])
    flag = partial(add_flag, parser)
    flag("--nodes", int, 1, "machines")
    flag("--ngpus", int, 8, "GPUs and processes per machine; 0: one process on the CPU")
    flag("--cpus_per_task", int, 10, "CPU cores of each process")
    flag("--timeout", int, 4320, "minutes until the job is stopped and queued again")
    flag("--max_timeouts", int, 100, "how often it is queued again after its time was over")
    flag("--signal_delay", int, 120, "seconds before the end at which the run is asked to save")
    flag("--partition", str, None, "of SLURM (default: the cluster's)")
    flag("--job_dir", Path, None, "folder that all machines share", required=True)
    flag("--job_name", str, "crossmae", "name in the queue")
    text = "local starts the processes on this machine, to try a command"
    flag("--cluster", str, "slurm", text, choices=["slurm", "local"])
    flag("script", str, None, " or ".join(SCRIPTS), choices=SCRIPTS, metavar="SCRIPT")
    flag("flags", str, None, "flags of the script", nargs=argparse.REMAINDER, metavar="FLAGS")
    return parser


def build_command(args: argparse.Namespace) -> list[str]:
    """The command of each process; its flags are those of the script's own parser."""
    flags = args.flags[1:] if args.flags[:1] == ["--"] else list(args.flags)
    parser = importlib.import_module(Path(args.script).stem).get_args_parser()
    given = vars(parse_flags(parser, flags))
    if given["output_dir"] == parser.get_default("output_dir"):
        flags += ["--output_dir", str(args.job_dir.resolve())]
    if not given["resume"]:
        flags += ["--resume", "auto"]
    return [sys.executable, "-u", str(ROOT / args.script), *flags]


def main(args: argparse.Namespace):
    """Submit, and return submitit's job."""
    check_ranges(args, RANGES)
    if importlib.util.find_spec("submitit") is None:
        raise UserError("tools.submit needs an optional package: pip install submitit")
    if args.cluster == "local" and args.nodes > 1:
        raise UserError("--cluster local is one machine: leave out --nodes.")
    import submitit

    command = build_command(args)
    make_writable(args.job_dir, "job_dir")
    # The job imports util.run.job, wherever it starts.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    options = {f"{args.cluster}_max_num_timeout": args.max_timeouts}
    try:
        executor = submitit.AutoExecutor(args.job_dir / "%j", cluster=args.cluster, **options)
    except RuntimeError as error:  # no sbatch
        raise UserError(
            f"There is no SLURM here ({error}); to try the command, add --cluster local."
        ) from error
    executor.update_parameters(
        name=args.job_name,
        nodes=args.nodes,
        tasks_per_node=max(1, args.ngpus),
        gpus_per_node=args.ngpus or None,
        cpus_per_task=args.cpus_per_task,
        timeout_min=args.timeout,
        slurm_partition=args.partition,
        slurm_signal_delay_s=args.signal_delay,
    )
    job = executor.submit(Training(command))
    logger.info("Job %s: %s", job.job_id, " ".join(command))
    logger.info("Its logs: %s", args.job_dir / str(job.job_id))
    return job


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
