"""Steps, substeps, seeds and labels: what is no whole number in its range is refused."""

import numpy as np
import pytest
import torch

from gmflow_core import ImagePipeline, denoiser_of, flow_sigmas, sample_images
from gmflow_core.cli import main
from gmflow_core.files.checkpoint import SHIPPED
from gmflow_core.flow.checks import whole_number
from gmflow_core.sampling.few_steps import choose_sampling
from gmflow_core.sampling.seeds import same_noise, seed_list
from gmflow_core.sampling.solvers import SOLVERS, solve
from tests.core.test_gmdit import small_network

ODD = [2.5, 4.0, True, "4", None, float("nan"), np.float32(3), np.bool_(True), torch.tensor(3.9)]
ODD += [torch.tensor(True), b"4", [4], 10**5000, -1]


@pytest.fixture(scope="module")
def pipeline():
    return ImagePipeline.load(SHIPPED / "digits_k8.safetensors", device="cpu")


@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
def test_what_is_no_whole_number_is_refused_and_quoted(value, pipeline):
    with pytest.raises(ValueError, match="it has to be a whole number from 0 to 9") as error:
        whole_number("n", value, 0, 9)
    assert len(str(error.value)) < 150
    for call in (
        lambda: flow_sigmas(value),
        lambda: sample_images(small_network(), torch.tensor([0]), steps=value),
        lambda: seed_list([value]),
    ):
        with pytest.raises(ValueError, match="it has to be a whole number"):
            call()
    if value is not None:
        with pytest.raises(ValueError, match=r"steps is .* a whole number from 0"):
            pipeline.sample(["3"], steps=value)
    with pytest.raises(ValueError, match=r"is no label; give the name|there is no class"):
        pipeline.label_ids([value] if value != "4" else [1.5])


@pytest.mark.parametrize("value", [4, np.int64(4), np.uint8(4), torch.tensor(4)])
def test_whole_numbers_of_all_kinds_are_taken(value, pipeline):
    assert type(whole_number("n", value)) is int
    assert len(flow_sigmas(value)) == 5
    assert choose_sampling({}, steps=value).steps == 4
    assert pipeline.label_ids([value]) == pipeline.label_ids(value) == [4]
    assert seed_list(value) == seed_list([value]) == [4]


@pytest.mark.parametrize("solver", [name for name, each in SOLVERS.items() if each.substeps])
@pytest.mark.parametrize("substeps", [0, -1, 2.5, True, "4"])
def test_substeps_are_checked_before_the_network_is_called(solver, substeps):
    def never(x, sigma):
        raise AssertionError("the network was called")

    with pytest.raises(ValueError, match=r"substeps is .* from 1 to 1,000,000"):
        solve(solver, denoiser_of(never), torch.zeros(1, 2), flow_sigmas(2), substeps=substeps)


@pytest.mark.parametrize("seeds", [[2**63], [2**64], [-1], [1.9], "1", [True], ["1"]])
def test_seeds_that_torch_would_change_are_refused(seeds, pipeline):
    with pytest.raises(ValueError, match=r"a seed is .* from 0 to 2\*\*63 - 1"):
        pipeline.sample(["3"], seeds=seeds, steps=1)
    with pytest.raises(ValueError, match=r"a seed is"):
        sample_images(small_network(), torch.tensor([0]), seeds=seeds, steps=1)


def test_seeds_are_equal_modulo_their_noises(pipeline):
    x = pipeline.sample(["3"] * 3, seeds=[5, 5 + 2**32, 6], steps=1)
    assert torch.equal(x[0], x[1])
    assert not torch.equal(x[0], x[2])
    assert pipeline.sample("3", seeds=2**63 - 1, steps=1).shape == (1, 3, 8, 8)
    assert same_noise([5, 6, 5 + 2**32]) == (5, 5 + 2**32)
    assert same_noise([1, 2, 1]) == (1, 1)
    assert same_noise([0, 2**32 - 1]) is None


@pytest.mark.parametrize("label", [3.9, True])
def test_labels_of_images_are_integers(label):
    with pytest.raises(ValueError, match=r"labels are torch\.(float32|bool); give the numbers"):
        sample_images(small_network(), torch.tensor([label]), steps=1)


@pytest.mark.parametrize("option", ["--steps", "--substeps"])
@pytest.mark.parametrize("value", ["0", "-3"])
def test_the_command_checks_steps_before_it_loads(option, value, tmp_path):
    with pytest.raises(SystemExit, match=f"{option} is {value}; it has to be a whole number"):
        main(["sample", "no such model", option, value, "--out", str(tmp_path / "a.png")])


def test_further_settings_of_a_pipeline(pipeline):
    noise = pipeline.sample(["3"], steps=0)
    sizes = pipeline.sample(["3"], steps=1, size=(4, 8), order=1, substeps=2, spacing="sigma")
    assert (noise.shape, sizes.shape) == ((1, 3, 8, 8), (1, 3, 4, 8))
    sharp, soft = (
        pipeline.sample(["3"], solver="gm-policy", steps=2, temperature=each) for each in (0.1, 1)
    )
    assert not torch.equal(sharp, soft)
    for name, value in (("return_trajectory", True), ("sigmas", [1, 0]), ("callback", print)):
        with pytest.raises(TypeError, match=f"takes no {name}; call sample_images for that"):
            pipeline.sample(["3"], steps=1, **{name: value})
    with pytest.raises(TypeError, match="no solver has the settings ordre"):
        pipeline.sample(["3"], steps=1, ordre=1)


@pytest.mark.parametrize("size", [(0, 0), (8,), 8, (8.0, 8), "88", (-8, 8), (7, 7), (16, 16)])
def test_sizes_that_do_not_fit_are_refused(size, pipeline):
    with pytest.raises(ValueError, match=r"size has 1|a side of size is|do not fit this model"):
        pipeline.sample(["3"], steps=1, size=size)
