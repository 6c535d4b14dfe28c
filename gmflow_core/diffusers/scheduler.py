"""A scheduler for pipelines of diffusers that samples with GM-ODE, GM-SDE or the GM policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,  # noqa: F401  from_pretrained of a saved pipeline looks for it here
)
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ..files.errors import quoted
from ..flow.path import flow_sigmas, velocity_to_x0
from ..flow.policy import Policy, PolicyVelocity, predict_x0
from ..flow.single_gaussian import USUAL_SPREAD, single_gaussian
from ..gaussians.draws import Generator
from ..models.adapter_heads import POLICIES, Head
from ..sampling.second_order import Step, corrected
from ..sampling.solvers import SOLVERS, solve, usual_temperature

SAMPLERS = ("gm-ode", "gm-sde", "gm-policy")  # those of SOLVERS that a scheduler can be
SECOND_ORDER = ("gm-ode", "gm-sde")
FLOW = "flow_prediction"  # prediction_type of schedulers that serve flow models, too


class Offer(NamedTuple):
    """What an adapter's head predicted in the last call of the transformer.

    Args:
        head: the head.
        prediction: what its forward returned.
        mean: velocity tokens that the transformer returned, (B, N, C p^2).
    """

    head: Head
    prediction: PolicyVelocity
    mean: Tensor


class GMFlowScheduler(FlowMatchEulerDiscreteScheduler):
    """Scheduler that samples with GM-ODE, GM-SDE or the policy sampler of pi-Flow.

    It is made from the scheduler of a pipeline, whose time shift it keeps:

        pipe.scheduler = GMFlowScheduler.from_config(pipe.scheduler.config, solver="gm-ode")

    An ordinary model's velocity counts as the mean of one Gaussian (K = 1) of the set `spread`.
    Behind `load_gm_adapter` the scheduler gets the whole mixture, or another policy, that the
    adapter predicts; where the pipeline changes the mean velocity (true_cfg_scale), all of it is
    shifted along. Between two calls of the transformer x follows the mixture or policy in float32.

    Args:
        solver: one of SAMPLERS.
        solver_order: of "gm-ode" and "gm-sde": 1, or 2 for the second-order correction.
        substeps: as the solver counts them; its usual number if None.
        temperature: of "gm-policy", in (0, 1]; pi-Flow's for the number of steps if None.
        stochasticity: of "gm-policy", at least 0; see `sample_gm_policy`.
        spread: standard deviation of an ordinary model's velocity, at least 0.
        final_step_size: size of the last step relative to the others, in (0, 1], on the grid that
            replaces the evenly spaced times of the pipelines; times that the caller chose stay.
        seed: of the fresh noise of "gm-sde" and of stochasticity, since pipelines give their
            generator to no scheduler; each run starts from it anew. None: torch's own generator.
        policy: kind of policy, one of POLICIES, that an adapter hands over; None for ordinary
            models. `load_gm_adapter` sets it.
        Other arguments: as of FlowMatchEulerDiscreteScheduler. stochastic_sampling has no effect.

    Raises:
        ValueError: a setting is out of range, or the solver needs a mixture, and the policy is
            none.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
        solver: str = "gm-ode",
        solver_order: int = 2,
        substeps: int | None = None,
        temperature: float | None = None,
        stochasticity: float = 0.0,
        spread: float = USUAL_SPREAD,
        final_step_size: float = 1.0,
        seed: int | None = None,
        policy: str | None = None,
    ):
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
            stochastic_sampling=stochastic_sampling,
        )
        _check_settings(self.config)
        self._levels: list[float] = []  # sigmas of the run, on the CPU
        self._spacing = shift  # time shift that spaces the substeps
        self._generator: torch.Generator | None = None
        self._forget()

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None = None, *args: Any, **settings: Any):
        """Make the scheduler from another one's config; `settings` come before what it says.

        The time shift of UniPC and DPM-Solver++ on flow models, `flow_shift`, becomes `shift`.

        Raises:
            ValueError: the config is of a scheduler for no flow model.
        """
        predicted = (config or {}).get("prediction_type", FLOW)
        if predicted != FLOW:
            raise ValueError(
                f"the config is of a scheduler whose model predicts {quoted(predicted)}; "
                f"GMFlowScheduler needs a flow model's ({FLOW})"
            )
        if "flow_shift" in (config or {}) and "shift" not in config:
            settings = {"shift": config["flow_shift"], **settings}
        return super().from_config(config, *args, **settings)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Set the sigmas of a run; arguments as of FlowMatchEulerDiscreteScheduler.

        Evenly spaced times from 1, which pipelines give by default, and a number of steps alone,
        become those of `flow_sigmas` with `final_step_size`. Then the time shift is applied.
        """
        count = num_inference_steps if sigmas is None else len(sigmas)
        if timesteps is None and _evenly_spaced(sigmas, count):
            length = count - 1 + self.config.final_step_size
            sigmas = [1 - index / length for index in range(count)]
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self._levels = [min(1.0, max(0.0, sigma)) for sigma in self.sigmas.tolist()]
        self._spacing = mu if self.config.use_dynamic_shifting else self.shift
        if self.config.use_dynamic_shifting and self.config.time_shift_type == "exponential":
            self._spacing = math.exp(mu)
        seed = self.config.seed
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)
        self._forget()

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Return the sample at the next sigma.

        Args:
            model_output: mean velocity, (B, ...), guided or not.
            timestep: one of `timesteps`; it matters at the first step only.
            sample: of the same shape.
            generator: of fresh noise; that of `seed` if None.
            return_dict: False to return a tuple.

        Raises:
            ValueError: an adapter is expected to hand its prediction over, and did not.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        if self.step_index + 1 >= len(self._levels):
            raise ValueError("the run is over; call set_timesteps before the next one")
        sigma, sigma_next = self._levels[self.step_index : self.step_index + 2]
        x, policy, back = self._policy_at(model_output.detach(), sample, sigma)
        policy = self._corrected(policy, x, sigma, sigma_next)
        temperature = self.config.temperature
        if temperature is None:
            temperature = usual_temperature(len(self._levels) - 1 - (self.begin_index or 0))
        x = solve(
            self.config.solver,
            lambda x, sigma: policy,
            x,
            [sigma, sigma_next],
            order=1,  # which is what remains after `_corrected`
            substeps=self.config.substeps,
            shift=self._spacing,
            temperature=temperature,
            stochasticity=self.config.stochasticity,
            noise=self._generator if generator is None else generator,
        )
        self._step_index += 1
        self._offer = None
        sample = back(x).to(sample.dtype)
        return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)

    def offer(self, offer: Offer) -> None:
        """Take what an adapter's head predicted, for the coming step.

        The first of a step counts: that of the prompt, before that of a negative prompt.
        """
        if self._offer is None:
            self._offer = offer

    def _forget(self) -> None:
        """Forget the step before, and what was offered."""
        self._offer: Offer | None = None
        self._previous: Step | None = None

    def _policy_at(
        self, velocity: Tensor, sample: Tensor, sigma: float
    ) -> tuple[Tensor, Policy, Callable[[Tensor], Tensor]]:
        """Return x and the policy in a solver's shape, and the function back to a sample's shape.

        The solver's shape is the sample's own; behind an adapter it is (B, C, N p, p) for tokens
        (B, N, C p^2), a column of N squares, as solvers treat all pixels alike.
        """
        x, velocity = sample.float(), velocity.float()
        if self.config.policy is None:
            mean = velocity_to_x0(velocity, x, sigma)
            return x, single_gaussian(mean, sigma, self.config.spread), lambda x: x
        if self._offer is None:
            raise ValueError(
                f"the scheduler waits for the {self.config.policy} policy of an adapter, and the "
                "transformer handed none over; set the scheduler of the pipeline that the adapter "
                "was loaded into, or call unload() of the adapter"
            )
        head, prediction, own_mean = self._offer
        layout, (batch, count) = head.layout, sample.shape[:2]
        size = (count * layout.patch, layout.patch)

        def arrange(tokens: Tensor) -> Tensor:
            return layout.to_image(layout.from_tokens(tokens), size)

        def back(x: Tensor) -> Tensor:
            return layout.to_tokens(x.reshape(batch, -1, count, layout.patch**2))

        x = arrange(x)
        guidance = arrange(velocity - own_mean[:, :count].float())  # exactly 0 if there is none
        policy = predict_x0(head.to_image(prediction, size), x, sigma)
        return x, policy.moved(-sigma * guidance), back

    def _corrected(self, policy: Policy, x: Tensor, sigma: float, sigma_next: float) -> Policy:
        """Return the policy with the second-order correction, where the settings ask for it."""
        if self.config.solver not in SECOND_ORDER or self.config.solver_order == 1:
            return policy
        previous, size = self._previous, sigma - sigma_next
        self._previous = Step(policy, x, sigma, size)
        return policy if previous is None else corrected(policy, previous, x, sigma, size)


def _check_settings(config: Any) -> None:
    """Check the settings of a `GMFlowScheduler`.

    Raises:
        ValueError: see there.
    """
    if config.solver not in SAMPLERS:
        raise ValueError(f"solver is {quoted(config.solver)}; choose one of {', '.join(SAMPLERS)}")
    if config.solver_order not in (1, 2):
        raise ValueError(f"solver_order is {quoted(config.solver_order)}; it can be 1 or 2")
    if config.invert_sigmas:
        raise ValueError("invert_sigmas is set, and GM solvers need sigmas that fall from 1 to 0")
    if config.policy not in (None, *POLICIES):
        raise ValueError(
            f"policy is {quoted(config.policy)}; it can be None or one of {', '.join(POLICIES)}"
        )
    if config.policy not in (None, "GMFlow") and not SOLVERS[config.solver].takes_policies:
        raise ValueError(
            f"solver {config.solver} needs a mixture, and the adapter's policy is {config.policy}; "
            "choose gm-policy"
        )
    flow_sigmas(1, final_step_size=config.final_step_size)
    x, names = torch.zeros(1, 1), ("substeps", "temperature", "stochasticity")
    nothing = single_gaussian(x, 1.0, config.spread)
    settings = {name: config[name] for name in names}  # a run on nothing checks their ranges
    solve(config.solver, lambda *_: nothing, x, [1, 0], noise=torch.Generator(), **settings)


def _evenly_spaced(sigmas: Sequence[float] | None, count: int | None) -> bool:
    """Return whether sigmas are 1, 1 - 1/n, ..., 1/n, as pipelines give them, or left out."""
    if sigmas is None or not count:
        return bool(count)
    return all(abs(float(each) - (1 - i / count)) < 1e-6 for i, each in enumerate(sigmas))
