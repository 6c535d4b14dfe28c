"""GM and DX heads on tokens, against einops and plain formulas."""

import einops
import pytest
import torch
import torch.nn.functional as F

from gmflow_core.models.adapter_heads import ArcHead, DXHead, GMHead, HeadLayout, build_head
from tests.helpers import is_near, normal

WIDTH, CHANNELS, COMPONENTS, TIMES = 12, 3, 4, 5
LAYOUT = HeadLayout(channels=CHANNELS)
DX = {"type": "DX", "segment_size": 0.25, "shift": 3.2}


def head_tensors(policy="GMFlow"):
    """Random tensors under the published names."""
    rows = {"norm_out.linear": 2 * WIDTH}
    if policy == "GMFlow":
        rows.update(proj_out_means=COMPONENTS * CHANNELS * 4, proj_out_logweights=COMPONENTS * 4)
        rows.update({"proj_out_logstds.1": 7, "proj_out_logstds.3": 1})
    elif policy == "ArcFlow":
        rows.update(proj_out_means=COMPONENTS * CHANNELS * 4, proj_out_logweights=COMPONENTS * 4)
        rows["proj_out_loggamma"] = (COMPONENTS - 1) * 4
    else:
        rows["proj_out"] = TIMES * CHANNELS * 4
    tensors = {}
    for seed, (name, count) in enumerate(rows.items()):
        inputs = 7 if name == "proj_out_logstds.3" else WIDTH
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = (
            0.3 * normal(count, inputs, seed=seed),
            normal(count, seed=seed + 50),
        )
    return tensors


def modulated(t, tokens, embedding):
    scale, shift = F.linear(
        F.silu(embedding), t["norm_out.linear.weight"], t["norm_out.linear.bias"]
    ).chunk(2, 1)
    centred = tokens - tokens.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale[:, None])
        + shift[:, None]
    )


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (2, 3, 5)])
def test_a_gm_head_predicts_the_mixture_of_every_pixel(size):
    *frames, height, width = size
    rows, columns, count = (height + 1) // 2, (width + 1) // 2, (frames or [1])[0]
    tokens = normal(2, count * rows * columns + 3, WIDTH)  # the last 3 of a reference image
    embedding = normal(2, WIDTH, seed=9)
    t = head_tensors()
    head = build_head(t, {"type": "GMFlow"}, LAYOUT, WIDTH)
    prediction = head(tokens, embedding)
    image = head.to_image(prediction, size)

    pattern = "b (t h w) (k c p q) -> b k c t (h p) (w q)"
    axes = {"t": count, "h": rows, "w": columns, "k": COMPONENTS, "p": 2, "q": 2}
    tokens = modulated(t, tokens, embedding)
    used = tokens[:, : count * rows * columns]
    means = einops.rearrange(
        F.linear(used, t["proj_out_means.weight"], t["proj_out_means.bias"]), pattern, **axes
    )
    logits = einops.rearrange(
        F.linear(used, t["proj_out_logweights.weight"], t["proj_out_logweights.bias"]),
        pattern,
        c=1,
        **axes,
    )
    hidden = F.linear(
        F.silu(embedding), t["proj_out_logstds.1.weight"], t["proj_out_logstds.1.bias"]
    )
    log_std = F.linear(F.silu(hidden), t["proj_out_logstds.3.weight"], t["proj_out_logstds.3.bias"])

    def cropped(x):
        x = x[..., :height, :width]
        return x if frames else x.squeeze(3)

    assert is_near(image.means, cropped(means), 1e-5)
    assert is_near(image.log_weights, cropped(logits.log_softmax(1)), 1e-5)
    assert is_near(image.log_std.flatten(), log_std.flatten(), 1e-5)
    # what the base model goes on with: the mean, in its own order of tokens
    mean = LAYOUT.to_tokens(prediction.mean())[:, : used.shape[1]]
    del axes["k"]
    mean = einops.rearrange(mean, pattern.replace("k ", ""), **axes)
    assert is_near(image.mean(), cropped(mean.unsqueeze(1))[:, 0], 1e-5)


def test_a_dx_head_predicts_a_velocity_for_every_time():
    tokens, embedding, t = normal(2, 6, WIDTH), normal(2, WIDTH, seed=9), head_tensors("DX")
    head = build_head(t, DX, LAYOUT, WIDTH)
    prediction = head(tokens, embedding)
    image = head.to_image(prediction, (4, 6))
    values = F.linear(modulated(t, tokens, embedding), t["proj_out.weight"], t["proj_out.bias"])
    pattern = "b (h w) (n c p q) -> b n c (h p) (w q)"
    assert is_near(
        image.velocities, einops.rearrange(values, pattern, h=2, n=TIMES, p=2, q=2), 1e-5
    )
    assert (image.segment_size, image.shift, image.mode) == (0.25, 3.2, "grid")
    assert is_near(LAYOUT.to_tokens(prediction.mean()), values[..., -CHANNELS * 4 :], 1e-5)
    polynomial = {"type": "DX", "mode": "polynomial", "shift": 3.2}  # without a segment
    prediction = build_head(t, polynomial, LAYOUT, WIDTH)(tokens, embedding)
    assert (prediction.mode, prediction.segment_size) == ("polynomial", 1.0)
    assert is_near(LAYOUT.to_tokens(prediction.mean()), values[..., : CHANNELS * 4], 1e-5)


def test_folded_latents_hold_the_pixels_in_the_order_of_the_tokens():
    layout = HeadLayout(channels=32, folded=2)
    latent = normal(2, 128, 3, 5)
    image = einops.rearrange(latent, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)
    assert torch.equal(layout.unfold(latent), image)
    assert torch.equal(layout.fold(image), latent)
    tokens = einops.rearrange(latent, "b (c x) h w -> b c (h w) x", x=4)
    assert torch.equal(layout.to_image(tokens, layout.image_size(latent.shape)), image)
    assert torch.equal(layout.to_tokens(tokens), einops.rearrange(latent, "b c h w -> b (h w) c"))


def test_a_head_computes_in_the_type_of_its_tokens_and_owns_its_weights():
    t = {name: tensor.bfloat16() for name, tensor in head_tensors().items()}
    head = build_head(t, {}, LAYOUT, WIDTH)
    tokens, embedding = normal(1, 6, WIDTH), normal(1, WIDTH, seed=9)
    assert {p.dtype for p in head.parameters()} == {torch.bfloat16}
    exact = build_head({name: tensor.float() for name, tensor in t.items()}, {}, LAYOUT, WIDTH)(
        tokens, embedding
    )
    assert torch.equal(head(tokens, embedding).means, exact.means)
    assert is_near(head(tokens.bfloat16(), embedding.bfloat16()).means, exact.means, 0.03)
    before = head(tokens, embedding).means
    t["proj_out_means.bias"].zero_()
    assert torch.equal(head(tokens, embedding).means, before)


@pytest.mark.parametrize("name", sorted(head_tensors()))
def test_a_missing_or_misshapen_tensor_is_named(name):
    tensors = head_tensors()
    whole = tensors.pop(name)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        build_head(tensors, {}, LAYOUT, WIDTH)
    with pytest.raises(ValueError, match=f"{name.rsplit('.', 2)[0]}.*expected"):
        build_head({**tensors, name: whole[:-1]}, {}, LAYOUT, WIDTH)


def test_heads_for_another_base_or_policy_are_refused():
    with pytest.raises(ValueError, match="width 16"):
        build_head(head_tensors(), {}, LAYOUT, 16)
    with pytest.raises(ValueError, match="'type': 'Flow3'"):
        build_head(head_tensors(), {"type": "Flow3"}, LAYOUT, WIDTH)
    with pytest.raises(ValueError, match=r"settings .*'degree': 3"):
        build_head(head_tensors("DX"), {**DX, "degree": 3}, LAYOUT, WIDTH)
    with pytest.raises(ValueError, match=r"10 tensors do not fit.*'proj_out\.bias': expected none"):
        build_head(head_tensors("DX"), {}, LAYOUT, WIDTH)  # a DX adapter without metadata
    assert isinstance(build_head(head_tensors("DX"), DX, LAYOUT, WIDTH), DXHead)
    assert isinstance(build_head(head_tensors(), {}, LAYOUT, WIDTH), GMHead)
    arc, policy = head_tensors("ArcFlow"), {"type": "ArcFlow"}
    assert isinstance(build_head(arc, policy, LAYOUT, WIDTH), ArcHead)
    with pytest.raises(ValueError, match=r"proj_out_loggamma.bias': expected none"):
        build_head(arc, {}, LAYOUT, WIDTH)  # as a GM head
    short = {**arc, "proj_out_loggamma.weight": arc["proj_out_loggamma.weight"][:4]}
    with pytest.raises(ValueError, match=r"loggamma.weight': expected \(12, 12\), found \(4, 12\)"):
        build_head(short, policy, LAYOUT, WIDTH)
    with pytest.raises(ValueError, match="ArcFlow head"):
        build_head(head_tensors(), policy, LAYOUT, WIDTH)
