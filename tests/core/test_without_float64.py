"""Networks, sources and solvers run without float64 and some operations, as on Apple's GPUs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from gmflow_core import GaussianMixtureSource, Guidance, sample_images
from gmflow_core.flow.path import flow_sigmas
from gmflow_core.gaussians.tensors import widest
from gmflow_core.models.ditdh import DiTDH, DiTDHConfig
from gmflow_core.models.gmdit import GMDiT, GMDiTConfig
from gmflow_core.models.mlp import GMFlowMLP, GMFlowMLPConfig
from gmflow_core.sampling.denoisers import denoiser_of
from gmflow_core.sampling.solvers import SOLVERS, solve

LACKING = ("aten::_linalg_eigh", "aten::linalg_eigh", "aten::special_ndtri")  # of PyTorch's there
DEVICE = torch.device("mps", 0)  # without a number, PyTorch asks the missing device for one
SHARED = {"channels": 3, "latent_size": 4, "num_classes": 3, "log_std_dim": 8, "num_components": 3}
GMDIT = GMDiTConfig(
    **SHARED, patch_size=2, num_layers=1, num_heads=2, head_dim=8, spectrum_layers=(8,)
)
DITDH = DiTDHConfig(
    **SHARED,
    patch_size=1,
    trunk_layers=1,
    trunk_width=16,
    trunk_heads=2,
    head_layers=1,
    head_width=16,
    head_heads=2,
    spectrum_layers=(8,),
)


class OnDevice(torch.Tensor):
    """A tensor that says it is on the device, while the CPU holds its numbers.

    To PyTorch's core it is on "meta", as the core asks about the state of any other device.
    """

    device = DEVICE

    @staticmethod
    def __new__(cls, inner):
        assert inner.dtype not in (torch.float64, torch.complex128), "float64 on the device"
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """Create tensors on the device as `OnDevice`, as there is no such device here."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})


def run(op, args, kwargs):
    """Run an operation on the CPU; its result is on the device if it should be."""
    leaves = tree_leaves((args, kwargs))
    devices = [each for each in leaves if isinstance(each, torch.device)]
    if devices:
        on_device = devices[0].type in (DEVICE.type, "meta")
    elif op._schema.name == "aten::to" and len(args) > 1 and isinstance(args[1], torch.Tensor):
        on_device = isinstance(args[1], OnDevice)
    else:
        on_device = any(isinstance(each, OnDevice) for each in leaves)
    assert not (on_device and op._schema.name in LACKING), f"the device has no {op._schema.name}"
    inner_args, inner_kwargs = tree_map_only(OnDevice, lambda t: t.inner, (args, kwargs))
    inner_args, inner_kwargs = tree_map_only(
        torch.device, lambda _: torch.device("cpu"), (inner_args, inner_kwargs)
    )
    result = op(*inner_args, **inner_kwargs)
    if op._schema.name.endswith("_") and args[0] is not None:  # in place
        return args[0]
    return tree_map_only(torch.Tensor, OnDevice, result) if on_device else result


def move(network):
    """Return a network with random weights on the device, in evaluation mode."""
    for name, parameter in list(network.named_parameters()):
        owner = network.get_submodule(name.rpartition(".")[0])
        value = OnDevice(torch.randn_like(parameter) * 0.1)
        setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(value, requires_grad=False))
    for name, buffer in list(network.named_buffers()):
        owner = network.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], OnDevice(buffer))
    return network.eval()


def test_the_pretended_device_refuses_float64():
    with Pretend(), pytest.raises(AssertionError, match="float64"):
        torch.arange(3, dtype=torch.float64, device=DEVICE)
    with Pretend(), pytest.raises(AssertionError, match="float64"):
        torch.ones(3, device=DEVICE).double()
    with Pretend():
        x = torch.arange(3.0, device=DEVICE) + 1
        assert x.device == DEVICE
        assert x.cpu().double().tolist() == [1, 2, 3]
    assert widest(DEVICE) == torch.float32


@pytest.mark.parametrize(
    ("network", "solver", "guidance"),
    [
        *((GMDiT, solver, None) for solver in SOLVERS),
        (GMDiT, "gm-ode", Guidance(0.3)),
        (DiTDH, "gm-sde", Guidance(2.0, "cfg")),
    ],
)
def test_images_are_sampled(network, solver, guidance):
    torch.manual_seed(0)
    network = network(GMDIT if network is GMDiT else DITDH)
    labels, settings = torch.tensor([0, 1]), {"solver": solver, "guidance": guidance}
    with Pretend():
        x = sample_images(move(network), labels, steps=2, **settings)
    assert x.device == DEVICE
    assert x.inner.isfinite().all()


def test_images_of_a_mixture_source_are_sampled():
    torch.manual_seed(0)
    source = GaussianMixtureSource(
        torch.randn(3, 3, 4, 4), torch.ones(3, 1, 1, 1), torch.full((3,), 1 / 3).log()
    )
    with Pretend():
        x = sample_images(move(GMDiT(GMDIT)), None, steps=2, source=source, seeds=[0, 1])
        modes = source.to(DEVICE).posterior_modes(x, "soft")
    assert x.device == modes.device == DEVICE
    assert x.inner.isfinite().all()


def test_points_are_sampled():
    torch.manual_seed(0)
    network = GMFlowMLP(GMFlowMLPConfig(num_components=3, hidden_dim=8, embed_dim=4))
    noise = OnDevice(torch.randn(5, 2))
    with Pretend(), torch.no_grad():
        points = solve("gm-ode", denoiser_of(move(network)), noise, flow_sigmas(2))
    assert points.device == DEVICE
    assert points.inner.isfinite().all()
