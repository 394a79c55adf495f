import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_diffusers.process import Diffusion, FlowMatching, dynamic_mu, make_process, make_scheduler
from kdcore.errors import ModelError

seeds = st.integers(0, 2**31)


def flow(**config):
    return make_process(diffusers.FlowMatchEulerDiscreteScheduler(**config))


def values(seed, size=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2)]


@given(seed=seeds, sigma=st.floats(0.05, 0.95))
def test_flow_leads_back_to_the_clean_latents(seed, sigma):
    process, (clean, noise) = flow(), values(seed)
    timestep = torch.full((5,), 1000 * sigma)
    noised = process.noised(clean, noise, timestep)
    torch.testing.assert_close(process.clean(noised, process.target(clean, noise, timestep), timestep), clean)


@given(seed=seeds, level=st.integers(0, 900), kind=st.sampled_from(["epsilon", "v_prediction", "sample"]))
def test_diffusion_leads_back_to_the_clean_latents_whatever_is_predicted(seed, level, kind):
    process = make_process(diffusers.DDPMScheduler(prediction_type=kind))
    clean, noise = values(seed)
    timestep = torch.full((5,), level)
    noised = process.noised(clean, noise, timestep)
    found = process.clean(noised, process.target(clean, noise, timestep), timestep)
    torch.testing.assert_close(found, clean, atol=1e-4, rtol=1e-4)


def test_diffusion_is_that_of_the_scheduler():
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    process, (clean, noise) = Diffusion(scheduler), [v.float() for v in values(0)]
    timestep = torch.tensor([0, 10, 500, 900, 999])
    torch.testing.assert_close(process.noised(clean, noise, timestep), scheduler.add_noise(clean, noise, timestep))
    torch.testing.assert_close(process.target(clean, noise, timestep), scheduler.get_velocity(clean, noise, timestep))


def test_levels_of_a_flow_are_logit_normal():
    process = FlowMatching(diffusers.FlowMatchEulerDiscreteScheduler(), mean=0.5, std=0.7)
    generator = torch.Generator().manual_seed(0)
    sigma = torch.stack([process.draw(torch.Size((4, 2, 2)), generator) for _ in range(4000)]) / 1000
    assert abs(float(sigma.logit().mean()) - 0.5) < 0.05
    assert abs(float(sigma.logit().std()) - 0.7) < 0.05


def test_shift_is_that_of_the_scheduler():
    plain, shifted = flow(), flow(shift=3.0)
    draws = [p.draw(torch.Size((4, 2, 2)), torch.Generator().manual_seed(1)) / 1000 for p in (plain, shifted)]
    torch.testing.assert_close(draws[1], 3 * draws[0] / (1 + 2 * draws[0]))
    assert draws[1] > draws[0]


def test_dynamic_shift_grows_with_the_latents_and_is_that_of_flux():
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert dynamic_mu(scheduler, torch.Size((16, 64, 32))) == pytest.approx(calculate_shift(64 * 32 // 4))
    sigma = torch.tensor(0.4)
    wanted = scheduler.time_shift(calculate_shift(512), 1.0, sigma)
    process = FlowMatching(scheduler)
    process.mean, process.std = float(sigma.logit()), 1e-9
    found = process.draw(torch.Size((16, 64, 32)), torch.Generator().manual_seed(0)) / 1000
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_uniform_timesteps_cover_all_levels():
    process = make_process(diffusers.DDIMScheduler(num_train_timesteps=10))
    generator = torch.Generator().manual_seed(0)
    assert {int(process.draw(torch.Size((1,)), generator)) for _ in range(300)} == set(range(10))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_scheduler("DDPMSchedular", {}), r"did you mean .*'DDPMScheduler'"),
        (lambda: make_scheduler("DDPMScheduler", {}, {"beta_strat": 1}), r"scheduler_config.beta_strat.*'beta_start'"),
        (lambda: make_process(diffusers.ScoreSdeVeScheduler()), "neither sigmas of a flow nor betas"),
    ],
)
def test_wrong_schedulers_get_a_clear_sentence(call, message):
    with pytest.raises(ModelError, match=message):
        call()
