"""util/io/pretrained.py: weights of transformers and timm start a run and compute the same."""

import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import ThreadingHTTPServer

import pytest
import timm
import torch
from conftest import ENCODER, MEAN, STD
from safetensors.torch import save_file
from test_checkpoint import ROOT, Hub
from test_export import call

import main_finetune
import main_pretrain
from util.checkpoint import init_from, load_pretrained
from util.io import pretrained
from util.io.errors import CheckpointError, UserError
from util.io.pretrained import read_pretrained

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
SIZES |= dict(image_size=32, patch_size=8, layer_norm_eps=1e-6)
MAE = dict(decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2)
BEIT = dict(use_absolute_position_embeddings=True, use_mean_pooling=True)
BEIT |= dict(layer_scale_init_value=0.0, drop_path_rate=0.0)
TIMM = {k: v for k, v in ENCODER.items() if k != "norm_layer"}
IMGS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def randomize(model):
    """Every weight random, norms and biases too, so that a swap shows."""
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
    return model.eval()


@pytest.fixture
def native(tmp_path):
    """native(name, **options) -> (model of transformers, its folder)."""
    transformers = pytest.importorskip("transformers")

    def write(name: str, **options):
        cls = getattr(transformers, name)
        model = randomize(cls(cls.config_class(**(SIZES | options))))
        model.save_pretrained(tmp_path / name)
        processor = {"image_mean": MEAN, "image_std": STD}
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(processor))
        return model, str(tmp_path / name)

    return write


def load(model, source: str):
    """As --finetune does, but with the head of the file."""
    checkpoint = read_pretrained(source)
    head = {k: v for k, v in checkpoint["model"].items() if k.startswith("head.")}
    load_pretrained(model, checkpoint, source)
    model.load_state_dict(head, strict=False)
    return model.eval()


@torch.no_grad()
def test_vit_of_transformers(native, tiny_vit):
    theirs, folder = native("ViTForImageClassification", num_labels=5)
    ours = load(tiny_vit(global_pool=False), folder)
    assert_close(ours(IMGS), theirs(IMGS).logits)


@torch.no_grad()
def test_beit_layout_of_transformers(native, tiny_vit):
    theirs, folder = native("BeitForImageClassification", num_labels=5, **BEIT)
    ours = load(tiny_vit(), folder)
    assert_close(ours(IMGS), theirs(IMGS).logits)


@torch.no_grad()
@pytest.mark.parametrize("name, options", [("ViTModel", {}), ("BeitModel", BEIT)])
def test_encoders_of_transformers(name, options, native, tiny_mae, tiny_cross):
    """Without a prefix, and with a pooler of ViT that is left out."""
    theirs, folder = native(name, **options)
    expected = theirs(IMGS).last_hidden_state
    ours = (tiny_mae if name == "ViTModel" else tiny_cross)().eval()
    init_from(ours, read_pretrained(folder), folder)
    if name == "ViTModel":  # of encoder weights alone, --init_from takes no final norm
        weights = read_pretrained(folder)["model"]
        ours.norm.load_state_dict({x: weights[f"norm.{x}"] for x in ("weight", "bias")})
    features = ours.forward_features(IMGS)
    assert_close(torch.cat([features.cls[:, None], features.patches], dim=1), expected)


@torch.no_grad()
@pytest.mark.parametrize("names", ["saved", "of the Hub", "in memory"])
def test_mae_of_transformers_with_its_decoder(names, native, tiny_mae, caplog):
    """--init_from takes all of it: the loss and pixels are the same."""
    caplog.set_level("INFO")
    theirs, folder = native("ViTMAEForPreTraining", decoder_intermediate_size=64, **MAE)
    weights = theirs.state_dict()
    if names == "of the Hub":  # as in facebook/vit-mae-base
        for new, old in (
            ("vit.layers", "vit.encoder.layer"),
            *((f".{x[0]}_proj", f".attention.{x}") for x in ("query", "key", "value")),
            ("attention.o_proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ):
            weights = {name.replace(new, old): value for name, value in weights.items()}
        assert "decoder.decoder_layers.0.attention.attention.query.weight" in weights
    if names != "saved":
        save_file({k: v.contiguous() for k, v in weights.items()}, f"{folder}/model.safetensors")
    ours = tiny_mae().eval()
    init_from(ours, read_pretrained(folder), folder)
    assert f"matched {len(ours.state_dict())} of {len(ours.state_dict())} tensors" in caplog.text
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
    loss, pred, *_ = ours(IMGS, 0.75, vis=True, noise=noise)
    expected = theirs(IMGS, noise=noise)
    assert_close(loss, expected.loss)
    assert_close(pred, expected.logits)


def test_mae_of_transformers_starts_crossmae(native, tiny_cross, caplog):
    """The encoder; the decoder is another and keeps its initialization."""
    caplog.set_level("INFO")
    theirs, folder = native("ViTMAEForPreTraining", decoder_intermediate_size=64, **MAE)
    ours = tiny_cross()
    before = ours.decoder_pred.weight.clone()
    init_from(ours, read_pretrained(folder), folder)
    assert ours.decoder_pred.weight.equal(before) and "decoder: newly init" in caplog.text
    (norm,) = (x for name, x in theirs.vit.named_parameters() if "1.layernorm_after.weight" in name)
    assert ours.blocks[1].norm2.weight.equal(norm)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit_mean", "vit_cls", "cross", "mae"])
@pytest.mark.parametrize("to", ["timm", "transformers"])
def test_exported_folder_comes_back(to, kind, save, tmp_path, tiny_vit, tiny_cross, tiny_mae):
    file, model = save(kind)
    if to == "transformers":
        pytest.importorskip("transformers")
    call(file, to, tmp_path / "out")
    source = str(tmp_path / "out")
    if kind.startswith("vit"):
        loaded = load(tiny_vit(seed=3, global_pool=kind != "vit_cls"), source)
        assert_close(loaded(IMGS), model(IMGS))
        args = read_pretrained(source)["args"]
        assert args["mean"] == MEAN and args["std"] == STD and args["patch_size"] == 8
        return
    again = (tiny_cross if kind == "cross" else tiny_mae)(seed=3).eval()
    init_from(again, read_pretrained(source), source)
    found, expected = (x.run_blocks(x.embed(IMGS)) for x in (again, model))
    assert_close(found, expected)


@pytest.fixture
def timm_weights(monkeypatch):
    """timm:NAME gives a tiny model of the same class; returns it. No network."""

    def give(name: str, **options):
        model = randomize(timm.create_model(name, **(TIMM | options)))

        create_model = timm.create_model

        def create(wanted, pretrained=False, **more):
            assert wanted == name + ".mae" and more == {"num_classes": 0}
            if not pretrained:  # to see its class, before a download
                return create_model(name, **(TIMM | options | more))
            model.reset_classifier(0)
            return model

        monkeypatch.setattr(timm, "create_model", create)
        return model

    return give


@torch.no_grad()
def test_timm_name(timm_weights, tiny_vit):
    theirs = timm_weights("vit_base_patch16_224", num_classes=0)
    ours = load(tiny_vit(global_pool=False), "timm:vit_base_patch16_224.mae")
    assert_close(ours.norm(ours.run_blocks(ours.embed(IMGS)))[:, 0], theirs(IMGS))


@torch.no_grad()
@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_timm_folder_with_its_head(global_pool, tmp_path, tiny_vit):
    """As timm's own push_to_hf_hub writes it."""
    options = TIMM | {"global_pool": global_pool}
    theirs = randomize(timm.create_model("vit_small_patch16_224", num_classes=5, **options))
    save = pytest.importorskip("timm.models._hub").save_for_hf
    options["img_size"] = [32, 32]
    save(theirs, str(tmp_path), model_args=options, safe_serialization=True)
    ours = load(tiny_vit(global_pool=global_pool == "avg"), str(tmp_path))
    assert_close(ours(IMGS), theirs(IMGS))


@pytest.mark.parametrize(
    "options, found",
    [
        ({"init_values": 0.1}, "it has blocks.0.ls1.gamma"),
        ({"reg_tokens": 2}, "it has reg_token"),
        ({"pre_norm": True}, "it has norm_pre.weight"),
        ({"no_embed_class": True}, "it is a VisionTransformer"),
        ({"class_token": False, "global_pool": "avg"}, "it is a VisionTransformer"),
        ({"act_layer": "quick_gelu"}, "it is a VisionTransformer"),
    ],
)
def test_other_vits_of_timm_are_refused(options, found, timm_weights):
    timm_weights("vit_base_patch16_224", **options)
    with pytest.raises(UserError, match=f"not a plain ViT with a class token \\({found}"):
        read_pretrained("timm:vit_base_patch16_224.mae")


@pytest.mark.parametrize(
    "source, text",
    [
        ("timm:vit_bas_patch16_224", r"timm has no model vit_bas_.*did you mean vit_base_patch16"),
        ("timm:resnet18", "is not a plain ViT with a class token .it has conv1.weight"),
    ],
)
def test_other_names_of_timm_are_refused(source, text, monkeypatch):
    """Before a download."""
    monkeypatch.setattr(pretrained, "quiet_hub", None)
    with pytest.raises(UserError, match=text):
        read_pretrained(source)


def test_failed_download_is_one_line(monkeypatch):
    def create(name, **options):
        raise RuntimeError("No pretrained weights exist\nTraceback and more")

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(UserError) as caught:
        read_pretrained("timm:vit_base_patch16_224.mae")
    assert "weights exist); check the name and the network." in str(caught.value)


@pytest.mark.parametrize(
    "config, weights, text",
    [
        ({"model_type": "resnet"}, {"x": torch.ones(1)}, "of type 'resnet'; vit, vit_mae, beit or"),
        ({"model_type": "vit"}, None, "has no weights: model.safetensors or pytorch_model.bin"),
        ({"model_type": "vit", "hidden_act": "relu"}, {"x": torch.ones(1)}, "activation relu"),
        ({"model_type": "vit", "image_size": "big"}, {"x": torch.ones(1)}, "args.input_size"),
        ("a list", {"x": torch.ones(1)}, "config.json holds a str, not a dict"),
        (
            {"model_type": "beit"},
            {"beit.encoder.layer.0.lambda_1": torch.ones(4)},
            "has encoder.layer.0.lambda_1, which the encoders here do not have",
        ),
    ],
)
def test_unsuitable_folder_is_refused(config, weights, text, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if weights:
        save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=text):
        read_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "options, text",
    [
        ({"num_attention_heads": 2}, "has num_heads 2, the model 4"),
        ({"num_hidden_layers": 3}, "has depth 3, the model 2"),
        ({"hidden_size": 64}, "but .* in the model"),
    ],
)
def test_other_sizes_are_refused(options, text, native, tiny_vit, tiny_cross):
    """Also those that the shapes of the weights do not show."""
    _, folder = native("ViTForImageClassification", **options)
    with pytest.raises(UserError, match=text):
        load_pretrained(tiny_vit(), read_pretrained(folder), folder)
    with pytest.raises(UserError, match=text):
        init_from(tiny_cross(), read_pretrained(folder), folder)


def test_runs_start_from_a_folder(tmp_path, image_folder, capsys):
    """--init_from and --finetune on the command line, with the size and mean of the folder."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=128, num_hidden_layers=6, num_attention_heads=4, image_size=16)
    config = transformers.ViTMAEConfig(**sizes, intermediate_size=512, patch_size=4)
    transformers.ViTMAEForPreTraining(config).save_pretrained(tmp_path / "hub")
    processor = {"image_mean": MEAN, "image_std": STD}
    (tmp_path / "hub" / "preprocessor_config.json").write_text(json.dumps(processor))
    flags = ["--data_path", str(image_folder), "--epochs", "1", "--warmup_epochs", "0"]
    flags += "--batch_size 4 --num_workers 0 --device cpu".split()
    pretrain = ["--model", "mae_vit_mini_patch4", "--cross_mae", "--decoder_depth", "1"]
    pretrain += ["--init_from", str(tmp_path / "hub"), "--output_dir", str(tmp_path / "pre")]
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(pretrain + flags))
    assert "tensors; decoder: newly initialized" in capsys.readouterr().out
    args = json.loads((tmp_path / "pre" / "run.json").read_text())["args"]
    assert args["mean"] == MEAN and args["std"] == STD and args["input_size"] == 16
    own = ["--mean", "0.1", "--output_dir", ""]
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(pretrain + flags + own))
    assert f"--mean is [0.1], {tmp_path / 'hub'} was trained with" in capsys.readouterr().out
    flags += ["--model", "vit_mini_patch4", "--output_dir", str(tmp_path / "run")]
    main_finetune.main(main_finetune.parse_args([*flags, "--finetune", str(tmp_path / "hub")]))
    assert "Matched 76 of 76 encoder tensors" in capsys.readouterr().out
    args = json.loads((tmp_path / "run" / "run.json").read_text())["args"]
    assert args["mean"] == MEAN and args["std"] == STD and args["input_size"] == 16


def test_repository_on_the_hub(native, tmp_path):
    """hf://owner/repository with a local server: config, weights, then the same from the cache."""
    _, folder = native("ViTMAEForPreTraining", decoder_intermediate_size=64, **MAE)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """
from util.io.pretrained import read_pretrained
checkpoint = read_pretrained("hf://own/repo")
print(len(checkpoint["model"]), checkpoint["args"]["mean"])
"""
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "h")}
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    try:
        for offline in ("0", "1"):
            result = subprocess.run(
                [sys.executable, "-c", code],
                env=env | {"HF_HUB_OFFLINE": offline},
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert result.stdout.strip() == f"{len(read_pretrained(folder)['model'])} {MEAN}", (
                result.stderr
            )
    finally:
        server.shutdown()


@pytest.mark.parametrize("options", [{"checkpoint_path": "x.bin"}, {"pretrained": True}, [1]])
def test_model_args_describe_a_model_only(options, tmp_path):
    """timm would open the file, or ask the network."""
    config = {"architecture": "vit_tiny_patch16_224", "model_args": options}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"cls_token": torch.zeros(1, 1, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has model_args that are not read"):
        read_pretrained(str(tmp_path))
