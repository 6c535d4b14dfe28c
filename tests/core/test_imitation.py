"""Imitation distillation: closed forms, gradients, and figures of LakonLab's own segment."""

import pytest
import torch

from gmflow_core import DXVelocity, GaussianMixture, flow_sigmas, predict_x0, shift_time
from gmflow_core.flow.imitation import (
    ImitationSettings,
    PolicyFlow,
    drop_components,
    imitate,
    imitate_segment,
    segment_at,
    segments,
)
from tests.helpers import F64, SPACES, golden, is_near, normal, random_mixture


def constant(value):
    """Return draws that are all one number."""
    return lambda count: torch.full((2, count), value)


def teacher_of_figures(x, sigma):
    """Return the velocity that the recorded segments were taught."""
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return 0.7 * torch.tanh(1.3 * x) - 0.4 * x * sigma + 0.2 * sigma


# settings of the recorded segments, and their ratio of the teacher
RECORDED = {
    "gm_data_free": (ImitationSettings(2, 3, 128, 0.0, 3.2), 0.0),
    "gm_mixing": (ImitationSettings(4, 3, 128, 0.4, 3.2), 0.5),
    "gm_teacher_forced": (ImitationSettings(3, 0, 64, 0.0, 1.0), 1.0),
    "dx_data_free": (ImitationSettings(2, 2, 32, 0.0, 1.0), 0.0),
}


@pytest.mark.parametrize("case", RECORDED)
def test_golden_segments(case):
    settings, ratio = RECORDED[case]
    figures = {
        name.removeprefix(f"{case}."): tensor
        for name, tensor in golden("imitation").items()
        if name.startswith(f"{case}.")
    }
    names = ["velocities"] if case.startswith("dx") else ["means", "logweights", "logstds"]
    parts = [figures[name].clone().requires_grad_() for name in names]
    velocity = DXVelocity(*parts, 0.5) if case.startswith("dx") else GaussianMixture(*parts)
    draws = iter([figures[name] for name in ("student", "teacher", "dropout") if name in figures])
    loss, x = imitate_segment(
        velocity,
        *(figures[name] for name in ("x", "start", "size")),
        teacher_of_figures,
        settings,
        lambda count: next(draws),
        ratio,
    )
    assert is_near(x, figures["x_end"], 1e-5)
    loss = 30 * loss.mean()  # the reference multiplies by 30
    assert is_near(loss.detach().reshape(1), figures["loss"], 1e-5)
    loss.backward()
    for number, part in enumerate(parts):
        assert is_near(part.grad, figures[f"grad{number}"], 1e-4)


@pytest.mark.parametrize("space", SPACES)
def test_a_policy_without_spread_is_one_euler_step(space):
    x, sigma = normal(2, 3, *space, dtype=F64), torch.tensor([0.9, 0.5], dtype=F64)
    u = normal(2, 3, *space, seed=2, dtype=F64)
    end = torch.tensor([0.3, 0.1], dtype=F64)
    mixture = GaussianMixture.point_mass(u)
    flow = PolicyFlow(predict_x0(mixture, x, sigma), x, sigma, ImitationSettings(substeps=32))
    step = (end - sigma).reshape(2, *[1] * (x.ndim - 1)) * u
    assert is_near(flow.follow(x, sigma, end), x + step, 1e-9)
    assert is_near(flow.mean_velocity(x, sigma, end), u, 1e-9)


def test_a_policy_takes_as_many_steps_as_its_way_is_long():
    """A way of k substeps takes k of them for all starts, whatever float32 makes of its length."""
    x, one = normal(1, 3), torch.ones(1)
    flow = PolicyFlow(GaussianMixture.point_mass(x), x, one, ImitationSettings(substeps=30))
    mean_at, calls = flow.mean_at, []
    flow.mean_at = lambda *place: calls.append(place) or mean_at(*place)
    for start in torch.linspace(0.5, 1, 20):
        for length, expected in [(0.0, 1), (0.4, 1), (1, 1), (1.2, 2), (3, 3), (15, 15)]:
            calls.clear()
            flow.follow(x, start * one, (start - length / 30) * one)
            assert len(calls) == expected, (start, length)


def test_a_window_is_at_most_the_segment():
    velocity, x, seen = random_mixture(), normal(2, 3, 2, 3), []

    def teacher(x, sigma):
        seen.append(sigma)
        return teacher_of_figures(x, sigma)

    start, size = torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.5])
    losses = [
        imitate_segment(
            velocity, x, start, size, teacher, ImitationSettings(1, window, 32), constant(0.7)
        )[0]
        for window in (16, 100)
    ]
    assert is_near(losses[1], losses[0], 1e-6)
    assert all(torch.equal(sigma, start) for sigma in seen)


@pytest.mark.parametrize("kind", ["gm", "dx"])
def test_the_loss_is_0_at_the_source_if_the_teacher_is_the_students_mean(kind):
    velocity = random_mixture() if kind == "gm" else DXVelocity(normal(2, 5, 3, 2, 3), 0.5, 1.5)
    mean, settings = velocity.mean(), ImitationSettings(1, 0, 32, shift=1.5)
    start, size = torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.5])
    arguments = velocity, normal(2, 3, 2, 3), start, size
    loss, _ = imitate_segment(*arguments, lambda x, sigma: mean, settings, constant(0.0))
    assert loss.max() < 1e-10
    loss, _ = imitate_segment(*arguments, lambda x, sigma: mean + 1, settings, constant(0.0))
    assert is_near(loss, torch.full((2,), 0.5), 1e-5)


def test_with_the_teacher_alone_the_states_lie_on_its_own_euler_path():
    x, seen = normal(2, 3, 2, 3), []

    def teacher(x, sigma):
        seen.append((x, sigma))
        return teacher_of_figures(x, sigma)

    start, size = torch.tensor([1.0, 0.6]), torch.tensor([0.4, 0.2])
    settings = ImitationSettings(3, 0, 32, shift=2.0)
    draws = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.9, 0.1]])
    imitate_segment(random_mixture(), x, start, size, teacher, settings, lambda n: draws[:, :n], 1)
    cuts = draws[:, :2].sort(1).values
    for state in range(3):
        time = start if state == 0 else start - size * cuts[:, state - 1]
        assert is_near(seen[state][1], shift_time(time, 2.0), 1e-6)
        assert is_near(seen[state][0], x, 1e-6)
        if state < 2:
            step = shift_time(start - size * cuts[:, state], 2.0) - seen[state][1]
            x = x + step.reshape(2, 1, 1, 1) * teacher_of_figures(x, seen[state][1])


@pytest.mark.parametrize(("way", "kind"), [(0.05, "gm"), (0.5, "gm"), (0.5, "dx")])
def test_gradients_agree_with_finite_differences(way, kind):
    """Of velocities over few substeps, and over many, which are computed again."""
    x, sigma = normal(2, 2, 2, dtype=F64), torch.tensor([0.9, 0.8], dtype=F64)
    place, settings = normal(2, 2, 2, seed=3, dtype=F64), ImitationSettings(substeps=40)
    time = torch.tensor([0.8, 0.6], dtype=F64)

    def mean_velocity(*parts):
        if kind == "dx":
            velocity = DXVelocity(*parts, 0.9)
        else:
            means, logits, log_std = parts
            velocity = GaussianMixture(means, logits.log_softmax(1), log_std)
        flow = PolicyFlow(predict_x0(velocity, x, sigma), x, sigma, settings)
        return flow.mean_velocity(place, time, time - way)

    if kind == "dx":  # linear in its velocities, which count as float32
        parts = normal(2, 4, 2, 2).requires_grad_()
        step, out = normal(2, 4, 2, 2, seed=5), mean_velocity(parts)
        (slope,) = torch.autograd.grad(out.sum(), parts)
        change = (mean_velocity(parts + step) - out).sum().detach()
        assert is_near((slope * step).sum().double().reshape(1), change.reshape(1), 1e-5)
        return
    mixture = random_mixture(channels=2, components=3, space=(2,), dtype=F64)
    parts = (mixture.means, mixture.log_weights, mixture.log_std)
    parts = [part.clone().requires_grad_() for part in parts]
    assert torch.autograd.gradcheck(mean_velocity, parts, atol=1e-6)


def test_gradients_reach_the_policy_alone():
    velocity, x = random_mixture(), normal(2, 3, 2, 3).requires_grad_()
    velocity.means.requires_grad_()
    weight = torch.ones((), requires_grad=True)

    def teacher(x, sigma):
        assert not torch.is_grad_enabled()
        return weight * x

    start, size = torch.ones(2), torch.full((2,), 0.5)
    settings = ImitationSettings(2, 3, 32, dropout=0.3)
    loss, end = imitate_segment(velocity, x.detach(), start, size, teacher, settings, constant(0.5))
    loss.sum().backward()
    assert velocity.means.grad.abs().sum() > 0
    assert weight.grad is None
    assert not end.requires_grad


def test_dropout_leaves_out_components_but_never_all():
    mixture = random_mixture(components=3)
    draws = torch.tensor([[0.1, 0.6, 0.9], [0.1, 0.2, 0.0]])
    dropped = drop_components(mixture, 0.5, lambda count: draws[:, :count])
    assert is_near(dropped.weights.sum(1), torch.ones(2, 1, 2, 3), 1e-6)
    assert dropped.weights[0, 0].abs().max() == 0
    expected = mixture.weights[0, 1:] / mixture.weights[0, 1:].sum(0)
    assert is_near(dropped.weights[0, 1:], expected, 1e-5)
    assert is_near(dropped.weights[1], mixture.weights[1], 1e-5)


@pytest.mark.parametrize(("steps", "last"), [(1, 1.0), (2, 1.0), (4, 0.5)])
def test_segments_are_those_of_the_sampler(steps, last):
    found = segments(steps, last)
    times = torch.tensor([start for start, _ in found] + [0.0])
    assert is_near(times, flow_sigmas(steps, final_step_size=last), 1e-6)
    assert sum(size for _, size in found) == pytest.approx(1)
    within = torch.linspace(0.001, 1, 50)
    start, size = segment_at(within, steps, last)
    assert (start - size).min() == pytest.approx(0, abs=1e-6)
    assert ((start - size - 1e-6 <= within) & (within <= start + 1e-6)).all()
    assert {round(value, 5) for value in start.tolist()} == {round(s, 5) for s, _ in found}


def test_each_segment_begins_where_the_one_before_ends_and_their_weights_sum_to_1():
    calls = []

    def student(x, sigma):
        calls.append((x, sigma))
        return GaussianMixture.point_mass(torch.ones_like(x))

    settings = ImitationSettings(2, 1, 32, shift=2.0)
    teacher = lambda x, sigma: torch.zeros_like(x)  # noqa: E731
    noise = normal(2, 3, 2)
    losses = list(imitate(student, teacher, noise, 3, settings, constant(0.5), final_step_size=0.5))
    assert is_near(sum(losses).reshape(1), torch.tensor([0.5]), 1e-5)
    sigmas = flow_sigmas(3, 2.0, final_step_size=0.5)[:3]
    for (x, sigma), expected in zip(calls, sigmas, strict=True):
        assert is_near(sigma, expected.expand(2), 1e-6)
        assert is_near(x, noise - (1 - expected), 1e-5)


@pytest.mark.parametrize("kind", ["gm", "dx"])
def test_a_policy_learns_the_way_of_one_noise(kind):
    """A policy's parameters alone, as in pi-Flow's toy: then its end is the teacher's own."""
    generator = torch.Generator().manual_seed(0)
    noise = normal(1, 1, 6)
    first = teacher_of_figures(noise, torch.ones(1)).unsqueeze(1)
    means = first + 0.5 * normal(1, 8, 1, 6, seed=4)
    parts = [means, torch.zeros(1, 8, 1, 6), torch.full((1, 1, 1, 1), -2.0)]
    parts = [part.requires_grad_() for part in parts[: 3 if kind == "gm" else 1]]
    optimizer = torch.optim.Adam(parts, lr=0.05)

    def student(x, sigma):
        if kind == "dx":
            return DXVelocity(parts[0])
        return GaussianMixture(parts[0], parts[1].log_softmax(1), parts[2])

    settings, found = ImitationSettings(4, 2, 16), []
    for _ in range(80):
        optimizer.zero_grad()
        uniform = lambda count: torch.rand(1, count, generator=generator)  # noqa: E731
        (loss,) = imitate(student, teacher_of_figures, noise, 1, settings, uniform)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert sum(found[-10:]) < 0.1 * sum(found[:10])
    x = noise
    for sigma in torch.linspace(1, 1 / 16, 16):
        x = x - teacher_of_figures(x, sigma.reshape(1)) / 16
    one = torch.ones(1)
    flow = PolicyFlow(predict_x0(student(noise, one), noise, one), noise, one, settings)
    assert (flow.follow(noise, one, 0 * one) - x).abs().max() < 0.1


@pytest.mark.parametrize(
    ("setting", "value"),
    [("states", 0), ("window", -1), ("substeps", 2.5), ("dropout", 1.0), ("shift", 0.0)],
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting} is {value}"):
        ImitationSettings(**{setting: value})


def test_steps_and_ratio_out_of_range_are_refused():
    with pytest.raises(ValueError, match="steps is 0"):
        segments(0)
    with pytest.raises(ValueError, match=r"final_step_size is 1\.5"):
        segments(2, 1.5)
    given = random_mixture(space=()), normal(2, 3), torch.ones(2), torch.ones(2), None
    with pytest.raises(ValueError, match="teacher_ratio is 2"):
        imitate_segment(*given, ImitationSettings(), constant(0.5), 2)
