"""What a one-step policy is compared with: DDPM and DDIM of diffusers, on the same network."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from cmpolicy.bench.networks import Array, Infer, Obs
from cmpolicy.flow.flow_map import Network
from cmpolicy.policy.policy import ConsistencyPolicy

_TRAIN_STEPS = 100  # of Diffusion Policy
#: Name of each sampler and its evaluations.
SAMPLERS = {"ddpm": 100, "ddim": 10}


def diffusion_chunk(name: str, policy: ConsistencyPolicy, network: Network) -> Infer:
    """An action chunk by ``ddpm`` or ``ddim``, the network taken for one that predicts the noise.

    Settings as in Diffusion Policy. The actions mean nothing, their time does.
    """
    scheduler_class = DDPMScheduler if name == "ddpm" else DDIMScheduler
    scheduler = scheduler_class(
        num_train_timesteps=_TRAIN_STEPS, beta_schedule="squaredcos_cap_v2", clip_sample=True
    )
    first = policy.n_obs_steps - 1

    @torch.inference_mode()
    def infer(obs: Obs, noise: Array) -> Array:
        here: Any = {"device": policy.device, "dtype": policy.dtype}
        condition = policy.encode({key: torch.as_tensor(v, **here) for key, v in obs.items()})
        x = torch.as_tensor(noise, **here)
        scheduler.set_timesteps(SAMPLERS[name])
        for step in scheduler.timesteps:
            t = (step / _TRAIN_STEPS).to(**here).expand(len(x))
            x = scheduler.step(network(x, t, t, condition), step, x).prev_sample
        action = policy.normalizer.unnormalize("action", x)
        chunk: Array = action[:, first : first + policy.n_action_steps].cpu().numpy()
        return chunk

    return infer
