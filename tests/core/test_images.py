"""Class-conditional sampling: golden trajectories, guidance and its interval, noise per image."""

from types import SimpleNamespace

import pytest
import torch

from gmflow_core import (
    GaussianMixture,
    GaussianMixtureSource,
    flow_sigmas,
    sample_gm_ode,
    sample_gm_sde,
    velocity_to_x0,
)
from gmflow_core.sampling.denoisers import class_denoiser
from gmflow_core.sampling.guidance import Guidance
from gmflow_core.sampling.images import sample_images
from gmflow_core.sampling.solvers import MEAN_SOLVERS, SOLVERS, SpectralDraws
from tests.core.test_gmdit import reference_network, small_network
from tests.helpers import golden, is_near, normal

RUNS = [
    (kind, order, steps, guidance)
    for kind in ("ode_sub1", "ode_sub4", "sde")
    for order in (1, 2)
    for steps in (4, 8)
    for guidance in ("0.0", "0.45")
]


@pytest.mark.parametrize(("kind", "order", "steps", "guidance"), RUNS)
def test_golden_trajectories(kind, order, steps, guidance):
    """Every intermediate x. Noise scaled by 1.00001 moves these runs by 2e-5 to 9e-5."""
    figures, network, path = golden("trajectories"), reference_network(), []
    name = f"{kind[:3]}{order}_n{steps}{kind[3:]}_g{guidance}"
    denoiser = class_denoiser(network, figures["labels"], Guidance(float(guidance)))
    settings = {"order": order, "callback": lambda step, x, x0: path.append(x)}
    if kind == "sde":
        recorded = [figures[f"{name}.{part}"] for part in ("draw_spectral", "eigvecs", "draw_sde")]
        draws = [
            SpectralDraws(
                recorded[0][i],
                recorded[1][i][:, None, None],
                recorded[2][i] if i + 1 < steps else None,
            )
            for i in range(steps)
        ]
        settings |= {"spectrum": network.spectrum_net, "noise": draws}
        x = sample_gm_sde(denoiser, figures["x_T"], flow_sigmas(steps), **settings)
    else:
        x = sample_gm_ode(
            denoiser, figures["x_T"], flow_sigmas(steps), substeps=int(kind[-1]), **settings
        )
    error = (torch.stack([*path[1:], x]) - figures[f"{name}.x"]).abs().max().item()
    assert error < (2e-4 if kind == "sde" else 3e-5)


def calls_of(network, guidance, steps=4):
    """Return the batch sizes of the network's calls in one run of two images."""
    sizes = []

    def counting(x, sigma, labels):
        sizes.append(len(x))
        return network(x, sigma, labels)

    counting.config = network.config
    sample_gm_ode(
        class_denoiser(counting, torch.tensor([1, 2]), guidance),
        normal(2, 4, 8, 8),
        flow_sigmas(steps),
    )
    return sizes


def test_the_unconditional_half_is_computed_only_where_guidance_acts():
    network = small_network()
    assert (
        calls_of(network, None)
        == calls_of(network, Guidance(0.0))
        == calls_of(network, Guidance(1.0, "cfg"))
        == [2] * 4
    )
    assert calls_of(network, Guidance(0.3)) == [4] * 4
    for interval in ((0.4, 0.8), (0.5, 0.75)):  # sigmas 1, .75, .5, .25; both ends belong to it
        assert calls_of(network, Guidance(0.3, interval=interval)) == [2, 4, 4, 2]


@pytest.mark.parametrize(("low", "high", "steps"), [(0, 0.3, 10), (0.7, 1, 10), (0.2, 0.6, 5)])
def test_both_ends_of_an_interval_belong_to_it_though_sigmas_are_rounded(low, high, steps):
    guidance = Guidance(0.3, interval=(low, high))
    acting = [sigma for sigma in flow_sigmas(steps)[:-1] if guidance.acts_at(sigma)]
    assert len(acting) == round((high - low) * steps) + (low > 0)


def test_classifier_free_guidance_extrapolates_the_mean_and_keeps_the_spread():
    network, x, sigma = small_network(), normal(2, 4, 8, 8), torch.tensor([0.7, 0.7])
    labels, none = torch.tensor([1, 2]), torch.tensor([10, 10])
    cond, uncond = (velocity_to_x0(network(x, sigma, y), x, sigma) for y in (labels, none))
    guided = class_denoiser(network, labels, Guidance(3.0, "cfg"))(x, sigma)
    assert is_near(guided.mean(), uncond.mean() + 3 * (cond.mean() - uncond.mean()), 1e-5)
    assert is_near(guided.moment_match().var, cond.moment_match().var, 1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_depends_on_its_own_seed_and_label_only(solver):
    network, labels = small_network(), torch.tensor([1, 2, 3])
    settings = {"solver": solver, "steps": 3, "guidance": Guidance(0.2)}
    together = sample_images(network, labels, seeds=[5, 6, 7], **settings)
    apart = sample_images(network, labels[1:2], seeds=[6], **settings)
    assert torch.allclose(together[1:2], apart, atol=2e-4)
    assert (
        together[0] - sample_images(network, labels[:1], seeds=[8], **settings)[0]
    ).abs().max() > 0.1


def test_gm_sde_uses_the_spectrum_and_every_size():
    network = small_network()
    white = small_network(spectrum_layers=None)
    labels, settings = torch.tensor([1, 2]), {"solver": "gm-sde", "steps": 2, "seeds": [1, 2]}
    with_spectrum = sample_images(network, labels, **settings)
    assert with_spectrum.isfinite().all()
    assert (with_spectrum - sample_images(white, labels, **settings)).abs().max() > 0.1
    assert sample_images(network, labels, size=(4, 6), **settings).shape == (2, 4, 4, 6)


def test_what_does_not_fit_is_quoted():
    network = small_network()
    with pytest.raises(ValueError, match=r"labels between 3 and 11 .* 10 classes"):
        class_denoiser(network, torch.tensor([3, 11]))
    with pytest.raises(ValueError, match="1 seeds do not fit 2 labels"):
        sample_images(network, torch.tensor([0, 1]), seeds=[1])
    with pytest.raises(ValueError, match=r"guidance weight 7\.5"):
        Guidance(7.5)
    with pytest.raises(ValueError, match="kind 'apg'"):
        Guidance(0.1, "apg")
    with pytest.raises(ValueError, match=r"interval \(0.9, 0.1\)"):
        Guidance(0.1, interval=(0.9, 0.1))
    mixture = GaussianMixture(torch.zeros(3, 1, 2), torch.zeros(3, 1, 1), torch.zeros(3, 1, 1))
    with pytest.raises(ValueError, match="2 generators do not fit a batch of 3"):
        mixture.sample([torch.Generator(), torch.Generator()])


CENTRES, WIDTHS = (
    torch.tensor([-2.0, 1.0, 3.0]),
    torch.tensor([0.5, 0.2, 0.3]),
)  # of the data of each mode
SOURCE = GaussianMixtureSource(
    torch.tensor([-1.5, 0.5, 2.5])[:, None, None, None].expand(3, 2, 4, 4),
    torch.tensor([0.8, 0.4, 1.5])[:, None, None, None],
    torch.tensor([0.5, 0.25, 0.25]).log(),
)


class ExactNetwork(torch.nn.Module):
    """Exact velocities for data N(CENTRES[m], WIDTHS[m]^2) of mode m and noise of that mode."""

    config = SimpleNamespace(channels=2, latent_size=4, num_classes=3, null_class=False)
    spectrum_net = None

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, sigma, labels):
        sigma, centre, width = (
            t.reshape(-1, 1, 1, 1) for t in (sigma, CENTRES[labels], WIDTHS[labels])
        )
        mean, std = SOURCE.moments(labels)
        var = ((1 - sigma) * width).square() + (sigma * std).square()
        x0 = centre + (1 - sigma) * width.square() / var * (x - (1 - sigma) * centre - sigma * mean)
        log_std = (width * std).log() - 0.5 * var.log()
        return GaussianMixture(
            ((x - x0) / sigma).unsqueeze(1), torch.zeros_like(x0[:, None, :1]), log_std.unsqueeze(1)
        )


@pytest.mark.parametrize("solver", SOLVERS)
def test_noise_of_known_modes_becomes_the_data_of_these_modes(solver):
    steps, order = (24, 1) if solver in (*MEAN_SOLVERS, "gm-sde") else (2, 1)
    modes = torch.arange(3).repeat_interleave(60)
    settings = {"steps": steps, "order": order, "substeps": 64, "source": SOURCE}
    x = (
        sample_images(ExactNetwork(), None, solver=solver, modes=modes, **settings)
        .unflatten(0, (3, 60))
        .flatten(1)
    )
    assert is_near(x.mean(1), CENTRES, 0.02)
    if solver not in MEAN_SOLVERS:
        assert (x.std(1) / WIDTHS - 1).abs().max() < (
            0.2 if solver == "gm-policy" else 0.06
        )  # which sharpens


def test_previews_are_those_of_the_samples():
    seen, settings = [], {"source": SOURCE, "modes": [0, 2], "steps": 3}
    x = sample_images(
        ExactNetwork(), None, **settings, callback=lambda step, x, x0: seen.append((x, x0))
    )
    assert is_near(
        seen[0][0],
        SOURCE.draw([0, 2], noise=seen[0][0].sub(SOURCE.means[[0, 2]]) / SOURCE.std[[0, 2]]),
        1e-5,
    )
    assert (seen[-1][1] - x).abs().max() < 1  # in the data's own units


def test_a_trajectory_is_in_the_datas_own_units():
    seen, settings = [], {"source": SOURCE, "modes": [0, 2], "steps": 3}
    x, trajectory = sample_images(
        ExactNetwork(),
        None,
        **settings,
        callback=lambda step, x, x0: seen.append((x, x0)),
        return_trajectory=True,
    )
    states, means = (torch.stack(each) for each in zip(*seen, strict=True))
    assert torch.equal(trajectory.x[:-1], states)
    assert torch.equal(trajectory.x0, means)
    assert torch.equal(trajectory.x[-1], x)


def test_a_constraint_is_in_the_datas_own_units():
    """Where a source's modes are known, solvers work in each mode's own coordinates."""
    known, seen = 0.25, []
    x, trajectory = sample_images(
        ExactNetwork(),
        None,
        **{"source": SOURCE, "modes": [0, 2], "steps": 3, "return_trajectory": True},
        constrain=lambda x, sigma: (1 - sigma) * known + sigma * x,
        blend=lambda start, sigma, x, end: seen.append((start, sigma)) or x,
    )
    assert is_near(x, torch.full_like(x, known), 1e-5)
    assert is_near(trajectory.x[-1], x, 1e-5)
    starts = torch.stack([start for start, _ in seen])
    assert is_near(starts, trajectory.x[:-1], 1e-5)


@pytest.mark.parametrize("solver", ["gm-ode", "gm-policy", "euler"])
def test_samples_may_end_half_way_to_the_data(solver):
    """At sigma a mode's samples are around (1 - sigma) times its data and sigma times its noise."""
    sigmas, modes = torch.linspace(1, 0.4, 25), torch.arange(3).repeat_interleave(60)
    x = sample_images(
        ExactNetwork(), None, solver=solver, sigmas=sigmas, source=SOURCE, modes=modes
    )
    end, means = sigmas[-1], SOURCE.means[:, 0, 0, 0]
    found = x.unflatten(0, (3, 60)).flatten(1).mean(1)
    assert is_near(found, (1 - end) * CENTRES + end * means, 0.03)


def test_a_spectrum_is_not_used_with_a_source():
    """A spectrum network is trained on white noise; the noise of a source replaces that."""
    settings = {"solver": "gm-sde", "source": SOURCE, "modes": [0, 2], "steps": 2}
    plain, with_spectrum = ExactNetwork(), ExactNetwork()
    with_spectrum.spectrum_net = lambda gaussian: torch.full_like(gaussian.mean, 3.0)
    same = [sample_images(each, None, **settings) for each in (plain, with_spectrum)]
    assert torch.equal(*same)


def test_modes_come_by_weight_and_from_each_seed():
    network = ExactNetwork()
    x = sample_images(network, None, steps=2, source=SOURCE, seeds=range(400))
    shares = (x.mean((1, 2, 3)).unsqueeze(1) - CENTRES).abs().argmin(1).bincount() / 400
    assert is_near(shares, SOURCE.weights, 0.12)
    assert is_near(sample_images(network, None, steps=2, source=SOURCE, seeds=[7, 5]), x[[7, 5]])


def test_autoguidance_moves_the_mean():
    network, guide = ExactNetwork(), ExactNetwork()
    guide.forward = lambda x, sigma, labels: ExactNetwork.forward(guide, x, sigma, labels.roll(1))
    settings = {"modes": torch.tensor([0, 1]), "source": SOURCE, "solver": "euler", "steps": 1}
    plain, weak = (sample_images(each, None, **settings) for each in (network, guide))
    assert is_near(
        sample_images(network, None, guide=guide, guide_scale=1.5, **settings),
        weak + 1.5 * (plain - weak),
        1e-5,
    )


def test_hidden_or_diagonal_modes_and_wrong_shapes_are_refused():
    network, labels = ExactNetwork(), torch.zeros(2, dtype=torch.long)
    other = ExactNetwork()
    other.config = SimpleNamespace(**{**vars(network.config), "num_classes": 2})
    with pytest.raises(ValueError, match="a network of 2 labels does not know the 3 modes"):
        sample_images(other, None, source=SOURCE, modes=labels)
    with pytest.raises(ValueError, match="give the source, too"):
        sample_images(network, labels, modes=labels)
    with pytest.raises(
        ValueError, match=r"gm-ode .* does not know the modes; use one of euler, dpmpp-2m"
    ):
        sample_images(network, labels, source=SOURCE)
    diagonal = GaussianMixtureSource(
        SOURCE.means, SOURCE.std.expand_as(SOURCE.means), SOURCE.log_weights
    )
    with pytest.raises(ValueError, match=r"gm-sde .* its modes are diagonal; use one of euler"):
        sample_images(network, None, solver="gm-sde", source=diagonal, modes=labels)
    settings = {"solver": "euler", "steps": 2, "modes": labels}
    same = [
        sample_images(network, None, source=source, **settings) for source in (SOURCE, diagonal)
    ]
    assert is_near(*same, 1e-6)
    with pytest.raises(
        ValueError, match=r"samples are \(2, 4, 4\), but the latents are \(2, 2, 2\)"
    ):
        sample_images(network, None, source=SOURCE, size=(2, 2), **settings)
    for given in ({"labels": labels}, {"labels": None, "source": SOURCE, "modes": labels}):
        with pytest.raises(ValueError, match="use autoguidance"):
            sample_images(network, **given, guidance=Guidance(0.3))
