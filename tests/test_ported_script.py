"""A training script written for MAE's modules runs, with the changes docs/differences.md lists."""

import argparse
from pathlib import Path

import numpy as np
import torch
from processes import run_python

import main_finetune
import main_pretrain
from util import misc
from util.lr_decay import get_layer_id_for_vit
from util.pos_embed import get_2d_sincos_pos_embed, get_2d_sincos_pos_embed_from_grid

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import sys
import torch
from torch.utils.data import DataLoader, TensorDataset
import models_mae
from engine_pretrain import train_one_epoch
import util.misc as misc
from util.misc import NativeScalerWithGradNormCount as NativeScaler
from main_pretrain import get_args_parser

args = get_args_parser().parse_args(["--device", "cpu", "--output_dir", sys.argv[1]])
args.lr, args.epochs, args.warmup_epochs = 1e-3, 2, 1
misc.init_distributed_mode(args)
torch.manual_seed(args.seed + misc.get_rank())
images = TensorDataset(torch.randn(8, 3, 32, 32), torch.zeros(8))
loader = DataLoader(images, batch_size=4, drop_last=True)
model = models_mae.mae_vit_mini_patch4(img_size=32, patch_size=16, decoder_depth=1)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
loss_scaler = NativeScaler()
for epoch in range(args.epochs):
    stats = train_one_epoch(
        model, loader, optimizer, args.device, epoch, loss_scaler, log_writer=None, args=args
    )
    if misc.is_main_process():
        misc.save_model(args, epoch, model, optimizer, loss_scaler)
print(sorted(stats), misc.all_reduce_mean(2.5), misc.get_world_size())
"""


def test_a_script_written_for_mae(tmp_path):
    done = run_python("-c", SCRIPT, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "['grad_norm', 'loss', 'lr'] 2.5 1" in done.stdout
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert checkpoint["epoch"] == 1 and "mask_token" in checkpoint["model"]


def test_the_names_of_misc_are_there():
    classes = "MetricLogger SmoothedValue NativeScalerWithGradNormCount"
    functions = (
        "save_model load_model init_distributed_mode is_main_process get_rank get_world_size "
        "all_reduce_mean"
    )
    assert all(hasattr(misc, name) for name in f"{classes} {functions}".split())


def test_parsers_can_be_parents():
    """As a cluster launcher uses them, with flags and a help of its own."""
    for main, epochs in ((main_pretrain, 400), (main_finetune, 50)):
        parser = argparse.ArgumentParser(parents=[main.get_args_parser(add_help=False)])
        parser.add_argument("--ngpus", type=int, default=8)
        args = parser.parse_args(["--ngpus", "2"])
        assert (args.ngpus, args.epochs) == (2, epochs)


def test_sincos_helpers_take_arrays():
    """MAE calls them with a (2, 1, H, W) array, columns first."""
    grid = np.stack(np.meshgrid(np.arange(3), np.arange(2))).reshape(2, 1, 2, 3)
    found = get_2d_sincos_pos_embed_from_grid(8, grid)
    torch.testing.assert_close(found, get_2d_sincos_pos_embed(8, (2, 3)), rtol=0, atol=0)


def test_layer_ids():
    names = ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.x", "blocks.11.x"]
    assert [get_layer_id_for_vit(name, 13) for name in [*names, "head.bias"]] == [
        *(0, 0, 0, 1, 12, 13)
    ]
