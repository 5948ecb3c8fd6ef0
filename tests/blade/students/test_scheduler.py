"""Few-step sampling: exact where the model is, reproducible, at trained times alone, in Diffusers' own pipelines."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
)

from blade.students.scheduler import FewStepScheduler

FLOW = (999.0, 874.0, 749.0, 624.0, 499.0, 374.0, 249.0, 124.0)
TDM_COGVIDEOX_2B = (999, 856, 665, 399)
"""Source: TDM, arXiv 2503.06674, its released CogVideoX-2B weights."""


def cogvideox_2b():
    """As the model is released."""
    return CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0, timestep_spacing="trailing"
    )


def levels(scheduler, time):
    """Alpha and sigma, from the definition."""
    if scheduler.config.prediction_type == "flow_prediction":
        return 1 - time / 1000, time / 1000
    squared = cogvideox_2b().alphas_cumprod[int(time)].item()
    return squared**0.5, (1 - squared) ** 0.5


SCHEDULERS = [
    lambda **options: FewStepScheduler([FLOW, FLOW[::2]], **options),
    lambda **options: FewStepScheduler.like(cogvideox_2b(), [TDM_COGVIDEOX_2B], **options),
]


@pytest.mark.parametrize("make", SCHEDULERS)
def test_where_the_model_is_right_every_sample_is_on_the_path_and_the_last_is_clean(make):
    scheduler = make()
    scheduler.set_timesteps(4)
    clean, noise = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))[:, None]
    times = [*scheduler.timesteps.tolist(), None]
    alpha, sigma = levels(scheduler, times[0])
    sample = alpha * clean + sigma * noise
    for time, later in itertools.pairwise(times):
        assert scheduler.step_index == (None if time == times[0] else times.index(time))
        alpha, sigma = levels(scheduler, time)
        flow = scheduler.config.prediction_type == "flow_prediction"
        output = noise - clean if flow else alpha * noise - sigma * clean
        result = scheduler.step(output, torch.tensor(time), sample)
        torch.testing.assert_close(result.pred_original_sample, clean, rtol=1e-4, atol=1e-4)
        sample = result.prev_sample
        if later is not None:
            alpha, sigma = levels(scheduler, later)
            torch.testing.assert_close(sample, alpha * clean + sigma * noise, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sample, clean, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="The run is over; call `set_timesteps`"):
        scheduler.step(output, torch.tensor(399), sample)


@pytest.mark.parametrize("make", SCHEDULERS)
@pytest.mark.parametrize("kept", [0.0, 0.9])
def test_noise_is_renewed_but_for_the_share_that_is_kept(make, kept):
    scheduler = make(noise_kept=kept)
    scheduler.set_timesteps(4)
    first, second = scheduler.timesteps[:2].tolist()
    noise = torch.randn(1, 20000, generator=torch.Generator().manual_seed(0))
    alpha, sigma = levels(scheduler, first)
    flow = scheduler.config.prediction_type == "flow_prediction"
    clean = torch.full_like(noise, 2.0)
    output = noise - clean if flow else alpha * noise - sigma * clean
    sample, _ = scheduler.step(output, first, alpha * clean + sigma * noise, return_dict=False)
    alpha, sigma = levels(scheduler, second)
    renewed = (sample - alpha * clean) / sigma
    assert renewed.mean().item() == pytest.approx(0.0, abs=0.03)
    assert renewed.std().item() == pytest.approx(1.0, abs=0.03)
    assert (renewed * noise).mean().item() == pytest.approx(kept, abs=0.03)


def test_fresh_noise_depends_on_the_first_sample_or_on_a_generator_and_on_nothing_else():
    def second_sample(value, generator=None):
        scheduler = FewStepScheduler([FLOW], noise_kept=0.0)
        scheduler.set_timesteps(8)
        return scheduler.step(torch.zeros(1, 40), 999.0, torch.full((1, 40), value), generator).prev_sample

    first = second_sample(1.0)
    torch.manual_seed(5)
    assert torch.equal(second_sample(1.0), first)
    assert not torch.equal(second_sample(1.5) - 1.5 * 0.126, first - 0.126)
    seeded = [second_sample(1.0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])


@pytest.mark.parametrize("make", SCHEDULERS)
@pytest.mark.parametrize("given", [False, True], ids=["own generators", "the pipeline's"])
def test_a_samples_noise_does_not_depend_on_its_neighbours(make, given):
    def run(seeds):
        scheduler = make(noise_kept=0.2)
        scheduler.set_timesteps(4)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        sample = torch.cat([torch.randn(1, 3, 5, generator=generator) for generator in generators])
        for time in scheduler.timesteps:
            sample = scheduler.step(0.3 * sample, time, sample, generators if given else None).prev_sample
        return sample

    alone = torch.cat([run([seed]) for seed in (1, 2, 3)])
    assert torch.equal(run([1, 2, 3]), alone)
    assert torch.equal(run([3, 1]), alone[[2, 0]])
    assert not torch.equal(alone[0], alone[1])


def test_samples_keep_their_type_and_half_precision_does_not_enter_the_arithmetic():
    scheduler = FewStepScheduler([FLOW])
    for dtype in (torch.float32, torch.bfloat16):
        scheduler.set_timesteps(8)
        sample = torch.full((3,), 1.0, dtype=dtype)
        result = scheduler.step(torch.full((3,), 0.5, dtype=torch.bfloat16), 999.0, sample)
        assert result.prev_sample.dtype == dtype and result.pred_original_sample.dtype == torch.float32
        assert result.pred_original_sample[0].item() == pytest.approx(1 - 0.999 * 0.5, abs=1e-6)


def test_a_run_may_begin_later_and_noise_be_added_for_it():
    scheduler = FewStepScheduler([FLOW])
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(6)
    clean, noise = torch.full((2, 3), 2.0), torch.full((2, 3), -1.0)
    sample = scheduler.add_noise(clean, noise, scheduler.timesteps[6:])
    torch.testing.assert_close(sample[:, 0], torch.tensor([0.751 * 2 - 0.249, 0.876 * 2 - 0.124]))
    scheduler.step(noise - clean, scheduler.timesteps[6], sample[:1])
    assert scheduler.step_index == 7


def test_untrained_step_counts_are_refused_by_name():
    scheduler = FewStepScheduler([FLOW, FLOW[::2]])
    assert scheduler.step_counts == (4, 8)
    with pytest.raises(ValueError, match="`num_inference_steps` must be 4 or 8, as trained, got 50"):
        scheduler.set_timesteps(50)
    with pytest.raises(ValueError, match="`sigmas` must be left to the scheduler"):
        scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.8, 0.7])
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"`timestep` must be one of \[999.0, 749.0, 499.0, 249.0\], got 800.0"):
        scheduler.step(torch.zeros(1), 800.0, torch.zeros(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prediction_type": "epsilon"},
            '`prediction_type` must be one of "flow_prediction", "v_prediction", got \'epsi',
        ),
        ({"noise_kept": 1.5}, r"`noise_kept` must be in \[0, 1\], got 1.5"),
        ({"grids": []}, "`grids` must hold at least one grid"),
        ({"grids": [[499.0, 999.0]]}, r"descending numbers up to 1000, got \[499.0, 999.0\]"),
        ({"grids": [[1000]], "prediction_type": "v_prediction"}, "descending whole numbers up to 999"),
        ({"grids": [[9.5]], "prediction_type": "v_prediction"}, "descending whole numbers"),
        ({"grids": [[9.0, 5.0], [8.0, 4.0]]}, r"one grid for each number of steps, got lengths \[2, 2\]"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FewStepScheduler(**options)


def test_it_is_made_from_the_models_own_scheduler():
    wan = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    for own in (wan, FlowMatchEulerDiscreteScheduler()):
        assert FewStepScheduler.like(own, [FLOW]).config.prediction_type == "flow_prediction"
    assert FewStepScheduler.like(cogvideox_2b(), [TDM_COGVIDEOX_2B]).config.snr_shift_scale == 3.0
    with pytest.raises(ValueError, match="got a DDPMScheduler with `prediction_type` 'epsilon'"):
        FewStepScheduler.like(DDPMScheduler(), [FLOW])


@pytest.mark.parametrize("make", SCHEDULERS)
def test_it_is_saved_and_loaded(make, tmp_path):
    scheduler = make(noise_kept=0.9)
    scheduler.save_pretrained(tmp_path)
    assert (tmp_path / "scheduler_config.json").exists()
    loaded = FewStepScheduler.from_pretrained(tmp_path)
    assert loaded.step_counts == scheduler.step_counts and loaded.config.noise_kept == 0.9
    for one in (scheduler, loaded):
        one.set_timesteps(4)
    sample = torch.ones(1, 4)
    first, second = (one.step(sample, one.timesteps[0], sample).prev_sample for one in (scheduler, loaded))
    assert torch.equal(first, second)


def wan_pipeline(make_wan):
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=make_wan(layers=1),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    return pipe, [FLOW[::2]], {"prompt_embeds": torch.ones(1, 6, 8)}


def cogvideox_pipeline(make_wan):
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=8, num_layers=1, max_text_seq_length=6, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    pipe = CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=cogvideox_2b()
    )
    return pipe, [TDM_COGVIDEOX_2B], {"prompt_embeds": torch.ones(1, 6, 8)}


def hunyuan_video_pipeline(make_wan):
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    pipe = HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, vae=None, transformer=transformer, text_encoder_2=None, tokenizer_2=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    embeds = {"prompt_embeds": torch.ones(1, 6, 8), "pooled_prompt_embeds": torch.ones(1, 8)}
    return pipe, [FLOW[::2]], {**embeds, "prompt_attention_mask": torch.ones(1, 6)}


@pytest.mark.parametrize("make", [wan_pipeline, cogvideox_pipeline, hunyuan_video_pipeline])
def test_pipelines_use_it_unchanged(make_wan, make):
    pipe, grids, prompt = make(make_wan)
    pipe.scheduler = FewStepScheduler.like(pipe.scheduler, grids, noise_kept=0.9)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    forward = pipe.transformer.forward
    times = SimpleNamespace(record=lambda inputs: seen.append(inputs["timestep"].flatten()[0].item()))

    def spy(*args, **inputs):
        times.record(inputs)
        return forward(*args, **inputs)

    pipe.transformer.forward = spy
    options = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 1.0, "output_type": "latent", **prompt}
    videos = [
        pipe(num_inference_steps=4, generator=torch.Generator().manual_seed(seed), **options).frames
        for seed in (0, 0, 1)
    ]
    assert seen[:4] == pytest.approx(list(grids[0])) and len(seen) == 12
    assert torch.equal(videos[0], videos[1]) and not torch.equal(videos[0], videos[2])
    assert videos[0].isfinite().all()
    with pytest.raises(ValueError, match="must be 4, as trained, got 6"):
        pipe(num_inference_steps=6, **options)


@pytest.mark.parametrize("make", [wan_pipeline, cogvideox_pipeline, hunyuan_video_pipeline])
def test_a_seeds_video_is_the_same_alone_and_in_a_batch(make_wan, make):
    pipe, grids, prompt = make(make_wan)
    pipe.scheduler = FewStepScheduler.like(pipe.scheduler, grids, noise_kept=0.5)
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 1.0, "output_type": "latent"}

    def run(*seeds):
        embeds = {name: value.repeat(len(seeds), *[1] * (value.ndim - 1)) for name, value in prompt.items()}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(num_inference_steps=4, generator=generators, **options, **embeds).frames

    alone = torch.cat([run(0), run(1)])
    torch.testing.assert_close(run(0, 1), alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(1, 0), alone.flip(0), rtol=1e-4, atol=1e-4)
    assert (alone[0] - alone[1]).abs().mean() > 0.1


def test_one_that_is_made_like_another_can_be_made_again_from_its_configuration():
    made = FewStepScheduler.like(FlowMatchEulerDiscreteScheduler(), [[900.0, 500.0]], noise_kept=0.5)
    again = FewStepScheduler.from_config(made.config)
    assert again.step_counts == (2,) and again.config.noise_kept == 0.5
