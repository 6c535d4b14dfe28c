"""The scheduler for diffusers, made from the configs of other schedulers."""

import pytest
import torch

from gmflow_core.flow.path import flow_sigmas

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}


@pytest.mark.parametrize("kind", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_the_shift_of_other_schedulers_of_flow_models_is_kept(kind):
    diffusers = pytest.importorskip("diffusers")  # takes seconds, so on one worker only
    from gmflow_core.diffusers import GMFlowScheduler

    config = getattr(diffusers, kind)(**FLOW).config
    scheduler = GMFlowScheduler.from_config(config)
    scheduler.set_timesteps(4)
    assert torch.allclose(scheduler.sigmas, flow_sigmas(4, 5.0), atol=1e-6)
    assert GMFlowScheduler.from_config(config, shift=2.0).shift == 2
    noise = getattr(diffusers, kind)().config
    with pytest.raises(ValueError, match="model predicts 'epsilon'; GMFlowScheduler needs a flow"):
        GMFlowScheduler.from_config(noise)
