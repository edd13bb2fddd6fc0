"""Thirty things users of the originals suffer from, and what answers each here.

An answer is a test (file::function) or a text (page#words that stand there). This file fails when
an answer disappears.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ANSWERS = {
    "does not run on current packages": [
        "test_end_to_end.py::test_help",
        "README.md#Installation and imports",
    ],
    "reconstructions look wrong": [
        "test_visualize.py::test_a_perfect_prediction_gives_back_the_picture"
    ],
    "which checkpoint do I have": [
        "test_checkpoint.py::test_kinds",
        "test_checkpoint.py::test_wrong_kind",
    ],
    "nan under mixed precision": [
        "test_faults.py::test_nan_on_one_rank",
        "test_faults.py::test_skipped_steps",
    ],
    "own data, folders, classes": [
        "docs/data.md#class",
        "test_loaders.py::test_a_bad_image_stops_training",
        "test_end_to_end.py::test_wrong_flags_end_in_one_sentence",
    ],
    "one machine, CPU": ["test_end_to_end.py::test_pretraining_writes_what_users_look_for"],
    "accumulation does nothing": [
        "test_engine_pretrain.py::test_accumulation_equals_a_large_batch"
    ],
    "accuracy cannot be reproduced": [
        "test_engine_pretrain.py::test_stored_run",
        "README.md#were not re-run",
    ],
    "learning rate confusion": ["test_run.py::test_peak_rate", "README.md#The learning rate is"],
    "resume": ["test_resume.py::test_killed_and_resumed", "test_faults.py::test_kill_campaign"],
    "torch.load fails": [
        "test_checkpoint.py::test_forms_that_load",
        "test_checkpoint.py::test_hostile",
    ],
    "channels and normalisation": ["test_textbook.py::test_other_sizes_and_channels"],
    "sizes that are not square": [
        "test_textbook.py::test_other_sizes_and_channels",
        "test_pos_embed.py::test_interpolation_changes_the_dict_in_place",
    ],
    "flash-attn": [
        "test_attention.py::test_reasons_on_a_gpu",
        "test_attention.py::test_nothing_global_is_changed",
    ],
    "loading starves the GPU": ["test_loaders.py::test_slow_data_loading_is_reported"],
    "shuffling": [
        "test_loaders.py::test_every_image_once_per_epoch",
        "test_loaders.py::test_ranks_get_disjoint_shards_of_an_epoch",
    ],
    "distributed evaluation": [
        "test_distributed.py::test_evaluation_does_not_depend_on_the_processes"
    ],
    "features": ["test_extract.py::test_formats_agree_and_outputs_are_deterministic"],
    "linear probe and kNN": [
        "test_finetune_tasks.py::test_a_linear_probe_leaves_the_encoder_as_it_is",
        "test_knn.py::test_equals_a_double_loop",
    ],
    "small data, low budget": [
        "scripts/demo.sh#mae_vit_mini_patch4",
        "docs/recipes.md#Small pictures on a CPU",
    ],
    "continue from weights": ["README.md#--init_from"],
    "several nodes, SLURM": ["test_distributed.py::test_launchers", "README.md#Several machines"],
    "flags that crash late": [
        "test_end_to_end.py::test_wrong_flags_end_in_one_sentence",
        "test_cli.py::test_epoch_is_short_for_epochs",
        "test_textbook.py::test_cross_mae",
    ],
    "encoder elsewhere": ["test_export.py::test_stock_timm_model_gives_the_same_outputs"],
    "memory and speed": [
        "docs/performance.md#Measured on the CPU",
        "test_benchmark.py::test_json_on_the_last_line",
    ],
    "bf16, TF32, compile": [
        "test_textbook.py::test_compiled_blocks_keep_names_and_loss",
        "test_textbook.py::test_under_bf16_autocast",
    ],
    "one bad image": [
        "test_loaders.py::test_bad_images_are_replaced_and_counted",
        "test_images.py::test_a_bad_file_is_named",
    ],
    "attention maps": ["test_visualize.py::test_attention_is_the_modules_own"],
    "licence": ["README.md#CC-BY-NC 4.0", "LICENSE#Creative Commons Attribution-NonCommercial 4.0"],
    "other backbones": ["models_cross.py#K maps (B, N, D) of one shape"],
}


def test_there_are_thirty():
    assert len(ANSWERS) == 30


@pytest.mark.parametrize("pain", ANSWERS)
def test_every_pain_has_its_answer(pain):
    for answer in ANSWERS[pain]:
        if "::" in answer:
            file, function = answer.split("::")
            text = (ROOT / "tests" / file).read_text()
            assert re.search(rf"^def {function}\(", text, re.MULTILINE), answer
        else:
            file, words = answer.split("#")
            assert words in " ".join((ROOT / file).read_text().split()), answer
