# ruff: noqa: F401
"""The names of MAE's util/misc.py, for scripts written for it; see docs/differences.md."""

from util.checkpoint import load_model, save_model
from util.distributed import (
    all_reduce_mean,
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_main_process,
)
from util.metrics import MetricLogger, SmoothedValue
from util.optim import NativeScalerWithGradNormCount
