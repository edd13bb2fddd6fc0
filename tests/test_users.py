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
        "test_end_to_end.py::test_help_lists_flags",
        "docs/install.md#PyTorch 2.11 or newer",
    ],
    "reconstructions look wrong": [
        "test_visualize.py::test_a_perfect_prediction_restores_the_image"
    ],
    "which checkpoint do I have": [
        "test_checkpoint.py::test_checkpoint_type",
        "test_checkpoint.py::test_wrong_type_is_refused",
    ],
    "nan under mixed precision": [
        "test_faults.py::test_nan_on_one_rank_ends_all_ranks",
        "test_faults.py::test_skip_nonfinite_skips_and_counts_steps",
    ],
    "own data, folders, classes": [
        "docs/data.md#class",
        "test_loaders.py::test_a_bad_image_stops_training",
        "test_end_to_end.py::test_invalid_flags_give_one_line_error",
    ],
    "one machine, CPU": ["test_end_to_end.py::test_pretraining_outputs"],
    "accumulation does nothing": ["test_engine_pretrain.py::test_accumulation_matches_large_batch"],
    "accuracy cannot be reproduced": [
        "test_engine_pretrain.py::test_run_matches_stored_values",
        "README.md#were not re-run",
    ],
    "learning rate confusion": [
        "test_run.py::test_peak_learning_rate",
        "docs/training.md#The learning rate is",
    ],
    "resume": [
        "test_resume.py::test_resume_after_kill_matches_uninterrupted_run",
        "test_faults.py::test_kill_campaign",
    ],
    "torch.load fails": [
        "test_checkpoint.py::test_supported_formats_load",
        "test_checkpoint.py::test_malicious_file_is_refused",
    ],
    "channels and normalization": [
        "test_reference.py::test_other_sizes_and_channels_match_reference"
    ],
    "sizes that are not square": [
        "test_reference.py::test_other_sizes_and_channels_match_reference",
        "test_pos_embed.py::test_interpolation_is_bicubic_and_in_place",
    ],
    "flash-attn": [
        "test_attention.py::test_name_states_why_flash_attn_is_not_used_on_gpu",
        "test_attention.py::test_selection_changes_no_global_state",
    ],
    "loading starves the GPU": ["test_loaders.py::test_slow_data_loading_is_reported"],
    "shuffling": [
        "test_loaders.py::test_every_image_once_per_epoch",
        "test_loaders.py::test_ranks_get_disjoint_shards_of_an_epoch",
    ],
    "distributed evaluation": [
        "test_distributed.py::test_evaluation_is_independent_of_world_size_and_batch_size"
    ],
    "features": ["test_extract.py::test_formats_agree_and_outputs_are_deterministic"],
    "linear probe and kNN": [
        "test_finetune_tasks.py::test_linear_probe_keeps_the_encoder_frozen",
        "test_knn.py::test_equals_a_double_loop",
    ],
    "small data, low budget": [
        "scripts/demo.sh#mae_vit_mini_patch4",
        "docs/recipes.md#Small images on a CPU",
    ],
    "continue from weights": ["docs/training.md#--init_from"],
    "several nodes, SLURM": [
        "test_distributed.py::test_launcher_variables",
        "docs/training.md#Multiple nodes",
        "docs/training.md#SLURM can send a signal",
    ],
    "flags that crash late": [
        "test_end_to_end.py::test_invalid_flags_give_one_line_error",
        "test_cli.py::test_epoch_abbreviates_epochs",
        "test_reference.py::test_cross_mae_matches_reference",
    ],
    "encoder elsewhere": ["test_export.py::test_timm_model_gives_the_same_outputs"],
    "memory and speed": [
        "docs/performance.md#Measured on a CPU",
        "test_benchmark.py::test_json_on_the_last_line",
    ],
    "bf16, TF32, compile": [
        "test_reference.py::test_compiled_blocks_keep_names_and_loss",
        "test_reference.py::test_bf16_error_is_that_of_the_reference",
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
