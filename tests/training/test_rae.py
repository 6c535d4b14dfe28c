"""RAEs: the decoder's recorded outputs, the encoders' own tokens, statistics, and bad folders."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gmflow_core import (
    GaussianMixtureSource,
    ImagePipeline,
    load_checkpoint,
    read_metadata,
    save_source,
)
from gmflow_core.models.ditdh import DiTDH, DiTDHConfig
from tests.helpers import golden, is_near, normal
from training import prepare
from training.data.pictures import centre_crop
from training.data.rae_statistics import add_latents, new_moments, save_statistics
from training.data.shards import LatentDataset
from training.encoders.hub import PARTS
from training.encoders.load import load_vae
from training.encoders.rae import RAE, load_decoder, new_decoder
from training.encoders.rae_files import load_rae, load_statistics, read_weights
from training.rae import main

STATISTICS = "stat.safetensors"
TINY_PART = {"layers": 1, "width": 16, "heads": 2}  # of a DiTDH
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
# Tiny encoders that make 4 x 4 tokens, and whose position tables have to be resized for that
KINDS = {
    "dinov2": (
        "Dinov2WithRegisters",
        {"patch_size": 7, "image_size": 35, "mlp_ratio": 2, "num_register_tokens": 3},
        28,
    ),
    "siglip2": ("SiglipVision", {"patch_size": 4, "image_size": 12, "intermediate_size": 12}, 16),
    "mae": ("ViTMAE", {"patch_size": 4, "image_size": 12, "intermediate_size": 12}, 16),
}


def tiny_network(kind):
    """Return a random encoder; norms, biases and tokens differ from their initial values too."""
    transformers = pytest.importorskip("transformers")
    name, sizes, _ = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **sizes)
    network = getattr(transformers, f"{name}Model")(config)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return network.eval().requires_grad_(False)


def tiny_decoder():
    torch.manual_seed(1)
    return new_decoder(channels=8, grid=4, width=16, layers=2, heads=2, hidden=24, patch=2).eval()


def decode(decoder, latents):
    """Decode latents (B, C, h, w), without the RAE's normalisations."""
    with torch.no_grad():
        return decoder.unpatchify(decoder(latents.flatten(2).mT).logits)


def write_rae(folder, kind="dinov2", **changes):
    """Write the parts of an RAE of 8 x 8 images, and the rae.json that names them."""
    tiny_network(kind).save_pretrained(folder / "encoder")
    decoder = tiny_decoder()
    tensors = {**decoder.state_dict(), "decoder_pos_embed": decoder.decoder_pos_embed}
    save_file(tensors, folder / "decoder.safetensors")
    shape = (8, 4, 4)
    statistics = {"mean": normal(*shape, seed=3), "var": normal(*shape, seed=4).exp()}
    save_file(statistics, folder / STATISTICS)
    torch.save(statistics, folder / "stat.pt")  # as published; it is read in another process
    parts = {
        "encoder": "encoder",
        "decoder": "decoder.safetensors",
        "statistics": STATISTICS,
        "decoder_heads": 2,
    }
    parts |= {"input_size": KINDS[kind][2], **changes}
    (folder / PARTS).write_text(
        json.dumps({name: part for name, part in parts.items() if part is not None})
    )
    return folder


@pytest.fixture
def rae_folder(tmp_path):
    return write_rae(tmp_path)


def test_golden_decoder():
    """RAE's public GeneralDecoder under its own names; positions are read, or computed."""
    figures = golden("rae_decoder_tiny")
    tensors = {name: t for name, t in figures.items() if name.startswith("decoder.")}
    for missing in ("", "decoder.decoder_pos_embed"):
        found = {name: t for name, t in tensors.items() if name != missing}
        decoder = load_decoder(found, grid=4, heads=2)
        assert is_near(decode(decoder, figures["latents"]), figures["images"], 1e-5)


def test_positions_of_the_file_are_taken():
    decoder = tiny_decoder()
    positions, names = decoder.decoder_pos_embed + 1, decoder.state_dict()
    again = load_decoder({**names, "decoder_pos_embed": positions}, grid=4, heads=2)
    assert torch.equal(again.decoder_pos_embed, positions)
    early = {name: t for name, t in names.items() if name != "trainable_cls_token"}
    assert load_decoder(early, grid=4, heads=2).trainable_cls_token.eq(0).all()


def test_the_published_decoder_is_a_vit_xl():
    with torch.device("meta"):
        decoder = new_decoder(
            channels=768, grid=16, width=1152, layers=28, heads=16, hidden=4096, patch=16
        )
    assert sum(p.numel() for p in decoder.parameters()) == 415_056_640


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_encoders_own_without_the_last_affine(kind, tmp_path):
    """Latents are the encoder's tokens; the token of the whole image has the affine part."""
    rae, images = load_rae(write_rae(tmp_path, kind, statistics=None)), normal(2, 3, 8, 8).tanh()
    size = KINDS[kind][2]
    mean, std = (
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        if kind != "siglip2"
        else ((0.5,) * 3, (0.5,) * 3)
    )
    pixels = torch.nn.functional.interpolate(
        (images + 1) / 2, (size, size), mode="bicubic", align_corners=False
    )
    pixels = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    network, inside = tiny_network(kind), {}
    body = getattr(network, "vision_model", network)
    norm = body.post_layernorm if kind == "siglip2" else body.layernorm
    norm.register_forward_pre_hook(lambda _, inputs: inside.update(hidden=inputs[0]))
    if kind == "mae":
        network.config.mask_ratio = 0.0
        theirs = network(
            pixels, noise=torch.arange(16.0).expand(2, -1), interpolate_pos_encoding=True
        )
    else:
        theirs = network(
            pixels, **({"interpolate_pos_encoding": True} if kind == "siglip2" else {})
        )
    tokens = torch.nn.functional.layer_norm(inside["hidden"], (8,), eps=norm.eps)[:, -16:]
    latents, token = rae.encode(images), rae.encoder.token(rae.encoder(images))
    assert is_near(latents, tokens.mT.unflatten(2, (4, 4)), 1e-6)
    assert is_near(
        token, theirs.pooler_output if kind == "siglip2" else theirs.last_hidden_state[:, 0], 1e-6
    )
    assert not any(p.requires_grad for p in rae.parameters())


def test_latents_are_normalised_and_back(tmp_path):
    """The statistics are read from the published kind of file."""
    rae = load_rae(write_rae(tmp_path, statistics="stat.pt"))
    images = normal(3, 3, 8, 8).tanh()
    assert rae.latent_shape(8, 8) == (8, 4, 4)
    assert (rae.factor, rae.scaling_factor, rae.space) == (2, 1.0, "rae")
    raw = rae.encoder.latents(rae.encoder(images))
    mean, var = normal(8, 4, 4, seed=3), normal(8, 4, 4, seed=4).exp()
    latents = rae.encode(images)
    assert is_near(latents, (raw - mean) / (var + 1e-5).sqrt(), 1e-6)
    assert torch.equal(rae.encode(images), latents)
    pictures = rae.decode(latents)
    expected = decode(tiny_decoder(), raw) * torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    expected = 2 * (expected + torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)) - 1
    assert is_near(pictures, expected, 1e-5)
    with pytest.raises(ValueError, match="pictures of 16x8 do not fit this RAE; it is for 8x8"):
        rae.latent_shape(8, 16)
    with pytest.raises(ValueError, match=r"decodes latents \('B', 8, 4, 4\), not \(1, 8, 4, 2\)"):
        rae.decode(torch.zeros(1, 8, 4, 2))
    plain = RAE(rae.encoder)
    assert torch.equal(plain.encode(images), raw)
    with pytest.raises(ValueError, match="no decoder"):
        plain.decode(latents)


@pytest.mark.parametrize("kind", ["dinov2", "mae"])
def test_the_layout_of_diffusers(kind, tmp_path):
    """Compare with diffusers' class, whose standard deviations are 1e-5 larger.

    It makes 16 x 16 tokens, the only grid for which its positions equal RAE's.
    """
    pytest.importorskip("transformers")
    try:
        from diffusers import AutoencoderRAE
    except (ImportError, RuntimeError):
        pytest.skip("this version of diffusers has no AutoencoderRAE")
    size, patch = (224, 14) if kind == "dinov2" else (64, 4)
    torch.manual_seed(0)
    theirs = AutoencoderRAE(
        encoder_type=kind,
        encoder_hidden_size=64,
        encoder_patch_size=patch,
        encoder_num_hidden_layers=1,
        encoder_input_size=size,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=24,
        patch_size=4,
        latents_std=normal(64, 16, 16).exp().clamp(min=0.5) if kind == "dinov2" else None,
    ).eval()
    for parameter in theirs.decoder.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path)
    ours, images = load_vae(tmp_path), normal(1, 3, 64, 64).tanh()
    assert isinstance(ours, RAE)
    with torch.no_grad():
        latents = theirs.encode((images + 1) / 2).latent
        assert is_near(ours.encode(images), latents, 1e-4)
        assert is_near(ours.decode(latents), 2 * theirs.decode(latents).sample - 1, 1e-4)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model\.safetensors"):
        load_vae(tmp_path)


def test_siglip_in_the_layout_of_diffusers(tmp_path):
    """Read the published names, from before transformers 5, without the last norm's affine."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "patch_size": 4,
        "image_size": 256,
    }
    network = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**sizes)
    ).requires_grad_(False)
    tensors = {
        f"encoder.vision_model.{k.removeprefix('vision_model.')}": t
        for k, t in network.state_dict().items()
    }
    tensors = {name: t for name, t in tensors.items() if "post_layernorm" not in name}
    decoder = new_decoder(channels=64, grid=16, width=16, layers=1, heads=2, hidden=24, patch=4)
    tensors |= {f"decoder.{name}": t for name, t in decoder.state_dict().items()} | {
        "_latents_mean": torch.ones(1)
    }
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    config = {
        "_class_name": "AutoencoderRAE",
        "encoder_type": "siglip2",
        "encoder_hidden_size": 64,
        "encoder_patch_size": 4,
    }
    config |= {
        "encoder_num_hidden_layers": 1,
        "encoder_input_size": 64,
        "decoder_num_attention_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    rae, images = load_rae(tmp_path), normal(1, 3, 64, 64).tanh()
    theirs = network(
        images, interpolate_pos_encoding=True
    ).last_hidden_state  # the affine part starts as none
    assert is_near(rae.encode(images), theirs.mT.unflatten(2, (16, 16)) - 1, 1e-6)
    (tmp_path / "config.json").write_text(json.dumps({**config, "encoder_type": "clip"}))
    with pytest.raises(ValueError, match="'clip'"):
        load_rae(tmp_path)


def test_statistics_in_one_pass(tmp_path):
    """Compare with numpy in float64, for means far larger than the spread, and any batch sizes."""
    latents = 1000 + normal(50, 3, 2, 2) * torch.tensor([0.1, 1, 10]).view(3, 1, 1)
    path, moments = tmp_path / "made" / "stat.safetensors", new_moments((3, 2, 2), latents.device)
    for part in latents.split([7, 1, 30, 12]):
        add_latents(moments, part)
    moments.add_up_processes()
    save_statistics(moments, path)
    found = load_file(path)
    exact = latents.double().numpy()
    np.testing.assert_allclose(found["mean"], exact.mean(0), rtol=2e-7)
    np.testing.assert_allclose(found["var"], exact.var(0), rtol=2e-7)
    mean, std = load_statistics(path)
    assert torch.equal(mean, found["mean"])
    assert torch.equal(std, (found["var"] + 1e-5).sqrt())
    with pytest.raises(FloatingPointError, match="not finite"):
        add_latents(moments, torch.full((2, 3, 2, 2), torch.nan))


def write_images(folder, count=5):
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng((number, ord(label))).integers(
                0, 256, (9, 12, 3), dtype=np.uint8
            )
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder


def test_prepare_and_statistics_from_the_command_line(rae_folder, tmp_path, capsys):
    """Prepared latents are the encoder's; the statistics are those of the raw latents."""
    data = write_images(tmp_path / "images")
    common = [
        "--data",
        str(data),
        "--vae",
        str(rae_folder),
        "--workers",
        "0",
        "--no-flip",
        "--device",
        "cpu",
    ]
    prepare.main([*common, "--out", str(tmp_path / "out"), "--size", "8"])
    dataset = LatentDataset(tmp_path / "out")
    assert (dataset.kind, dataset.shape, dataset.index["space"]) == ("latents", (8, 4, 4), "rae")
    rae = load_rae(rae_folder)
    pixels = torch.from_numpy(np.asarray(centre_crop(Image.open(data / "b" / "3.png"), 8)).copy())
    assert is_near(dataset[8][0], rae.encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1)[0], 1e-5)
    out = rae_folder / "statistics.safetensors"
    main(["statistics", *common, "--out", str(out), "--batch-size", "4"])
    assert "10 latents" in capsys.readouterr().out
    raw = dataset.__getitems__(range(10))[0] * rae.std + rae.mean
    assert is_near(load_file(out)["mean"], raw.mean(0), 1e-5)
    assert is_near(load_file(out)["var"], raw.var(0, correction=0), 1e-4)
    with pytest.raises(SystemExit, match="pictures of 16x16 do not fit this RAE"):
        prepare.main([*common, "--out", str(tmp_path / "odd"), "--size", "16"])


def test_what_a_folder_lacks_is_named(tmp_path):
    def says(match, error=FileNotFoundError):
        with pytest.raises(error, match=match):
            load_rae(tmp_path)

    says("holds no RAE: neither rae.json nor")
    write_rae(tmp_path, extra=1)
    says(
        "not an object with some of encoder, decoder, statistics, decoder_heads, input_size",
        ValueError,
    )
    write_rae(tmp_path, decoder="nothing.pt")
    says(r"there is no file .*nothing.pt., which .*rae.json names")
    write_rae(tmp_path, input_size=30)
    says("input_size 30 is not divisible by the encoder's patches of 7", ValueError)
    write_rae(tmp_path, input_size=35)
    says(
        r"do not fit a decoder of width 16 for 5 x 5 tokens, first 'decoder_pos_embed'", ValueError
    )
    write_rae(tmp_path, decoder_heads=3)
    says(
        "a decoder of width 16 cannot have 3 heads; give their number in decoder_heads", ValueError
    )
    write_rae(tmp_path, decoder=STATISTICS)
    says(r"stat.* an RAE's decoder has a tensor 'decoder_embed.weight', .* the 2 found", ValueError)
    write_rae(tmp_path, statistics="decoder.safetensors")
    says("instead of mean and var", ValueError)
    write_rae(tmp_path)
    save_file({"mean": torch.zeros(8, 2, 2)}, tmp_path / STATISTICS)
    says(r"the latents' mean is \(8, 2, 2\), which does not fit latents \(8, 4, 4\)", ValueError)
    save_file({"var": torch.full((8, 1, 1), torch.nan)}, tmp_path / STATISTICS)
    says(r"stat\.safetensors holds 8 numbers in 'var' that are not finite", ValueError)
    save_file({"var": torch.full((8, 1, 1), -1.0)}, tmp_path / STATISTICS)
    says("variances that are negative", ValueError)
    write_rae(tmp_path)
    (tmp_path / "encoder" / "config.json").write_text('{"model_type": "bert"}')
    says(
        "it is a bert; encoders are dinov2_with_registers, siglip_vision_model, vit_mae", ValueError
    )
    (tmp_path / "encoder" / "config.json").unlink()
    says("holds no encoder: there is no config.json")
    write_rae(tmp_path)
    weights = load_file(tmp_path / "encoder" / "model.safetensors")
    save_file(
        dict(list(weights.items())[1:]),
        tmp_path / "encoder" / "model.safetensors",
        {"format": "pt"},
    )
    says("tensors of the Dinov2WithRegistersModel are missing", ValueError)
    (tmp_path / "encoder" / "model.safetensors").unlink()
    says("there is no whole encoder")


def test_only_tensors_are_loaded(tmp_path):
    torch.save({"mean": RAE}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="not a PyTorch file of tensors alone"):
        read_weights(tmp_path / "code.pt")
    (tmp_path / "short.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"short\.pt is"):
        read_weights(tmp_path / "short.pt")


def test_an_rae_decodes_a_pipelines_latents(rae_folder):
    sizes = {f"{part}_{size}": n for part in ("trunk", "head") for size, n in TINY_PART.items()}
    network = DiTDH(DiTDHConfig(channels=8, latent_size=4, num_classes=2, **sizes)).eval()
    rae = load_vae(rae_folder)
    pipeline = ImagePipeline(network, {"space": "rae"}, vae=rae)
    settings = {"seeds": [1, 2], "solver": "euler", "steps": 1}
    expected = rae.decode(pipeline.sample([0, 1], **settings))
    for picture, image in zip(pipeline([0, 1], **settings), expected, strict=True):
        found = torch.tensor(list(picture.tobytes())).reshape(8, 8, 3).permute(2, 0, 1)
        assert (found - (image.clamp(-1, 1) + 1) * 127.5).abs().max() <= 1


def test_published_networks_become_checkpoints(tmp_path):
    tensors = {
        k.removeprefix("net."): v for k, v in golden("ddt_tiny").items() if k.startswith("net.")
    }
    last = {
        k.replace("blocks.2", "blocks.3"): v.clone()
        for k, v in tensors.items()
        if k.startswith("blocks.2")
    }
    networks = {"model": {"x": torch.zeros(1)}, "ema": {**tensors, **last}}  # the second is taken
    torch.save({**networks, "epoch": 3}, tmp_path / "stage2_model.pt")
    source, out = str(tmp_path / "stage2_model.pt"), str(tmp_path / "model.safetensors")
    main(["convert", "--source", source, "--out", out])
    found = load_file(out)
    assert torch.equal(found["blocks.3.attn.qkv.weight"], tensors["blocks.2.attn.qkv.weight"])
    source = str(tmp_path / "stage2_model.safetensors")  # read without a process of its own
    save_file(networks["ema"], source)
    with pytest.raises(SystemExit, match="there is no"):
        main(["convert", "--source", str(tmp_path / "none.pt"), "--out", out])
    _, config = load_checkpoint(out)
    shape = (config.channels, config.latent_size, config.latent_size)
    modes = config.num_classes + 1  # MM-FM's networks have no null class
    for count, options, said in (
        (modes, [], "mode"),
        (2, ["--unconditional"], "hidden"),
        (2, [], rf"knows {modes} labels, but the mixture has 2 modes"),
    ):
        means, weights = torch.randn(count, *shape), torch.full((count,), 1 / count).log()
        save_source(
            GaussianMixtureSource(means, torch.full((count, 1, 1, 1), 0.5), weights),
            tmp_path / "source.safetensors",
        )
        command = ["convert", "--source", source, "--out", out, *options]
        command += ["--mixture", str(tmp_path / "source.safetensors")]
        if count == 2 and not options:
            with pytest.raises(SystemExit, match=said):
                main(command)
            continue
        main(command)
        assert read_metadata(out)["data"]["source"]["conditioning"] == said
        pipeline = ImagePipeline.load(out, source=tmp_path / "source.safetensors", device="cpu")
        labels = None if options else [0, modes - 1]
        x = pipeline.sample(labels, seeds=[1, 2], solver="euler", steps=1)
        assert x.shape == (2, *shape)
        with pytest.raises(ValueError, match=r"training\.evaluate` decodes those of RAEs"):
            pipeline(labels, seeds=[1, 2])
