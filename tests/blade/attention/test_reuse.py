"""A choice of blocks is kept for several steps of the run, the pass and the prompt that it was made for alone."""

import gc

import pytest
import torch
from blade_kernels.block_selection import select_blocks

from blade import BladeConfig, apply_blade, remove_blade
from blade.attention import adaptive
from blade.attention.applied import applied_to
from blade.attention.config import AdaptiveConfig
from blade.attention.reuse import KeptChoices

PLAN = object()


def config(steps, **options):
    asa = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4, reselect_every=steps)
    return BladeConfig(**{"sparsity": 0.5, "asa": asa} | options)


@pytest.fixture
def chosen(monkeypatch):
    """Masks that are chosen, in turn."""
    masks = []

    def note(*arguments):
        masks.append(select(*arguments))
        return masks[-1]

    select = adaptive.select
    monkeypatch.setattr(adaptive, "select", note)
    return masks


def passes(transformer, inputs, step, total=12):
    applied_to(transformer).steps.fixed = step, total
    with torch.no_grad():
        return transformer(**inputs).sample


def test_a_mask_is_as_it_was():
    condition, mask = torch.zeros(1), select_blocks(torch.rand(2, 3, 9, 9), (8, 8), max_blocks=4)
    choices = KeptChoices(2)
    first = choices.of_pass(condition, None, PLAN, batch=2, step=4)
    assert first.mask(0, lambda: mask) is mask
    again = choices.of_pass(condition, None, PLAN, batch=2, step=5).mask(0, lambda: pytest.fail("it was chosen anew"))
    assert again.block_size == mask.block_size and torch.equal(again.keep, mask.keep)
    assert torch.equal(again.counts, mask.counts) and torch.equal(again.indices, mask.indices)


def test_the_steps_of_a_choice_begin_when_it_is_made():
    """At step 4 a cache skips all layers, so that nothing is chosen before step 5, and kept until step 7."""
    condition, mask = torch.zeros(1), select_blocks(torch.rand(2, 3, 9, 9), (8, 8), max_blocks=4)
    choices, made = KeptChoices(3), {}
    for step in range(4, 10):
        choices.begin_step(step)
        made[step] = choices.of_pass(condition, None, PLAN, batch=2, step=step)
        if step > 4:
            made[step].mask(0, lambda: mask)
    assert made[5] is not made[4] and made[5] is made[6] is made[7]
    assert made[8] is not made[7] and made[8] is made[9]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_blocks_are_chosen_at_every_so_many_steps(make_wan, wan_inputs, chosen, steps):
    transformer, inputs = apply_blade(make_wan(), config(steps, dense_steps=1, dense_layers=[0])), wan_inputs()
    counts = []
    for step in range(8):
        passes(transformer, inputs, step)
        counts.append(len(chosen))
    anew = [2 * (step > 0 and (step - 1) % steps == 0) for step in range(8)]
    assert torch.tensor(counts).diff().tolist() == anew[1:]


def test_the_first_of_the_steps_is_what_it_is_without(make_wan, wan_inputs):
    inputs = wan_inputs()
    kept, plain = (apply_blade(make_wan(), config(steps)) for steps in (2, 1))
    for step in range(4):
        outputs = [passes(transformer, inputs, step) for transformer in (kept, plain)]
        assert torch.equal(*outputs) == (step % 2 == 0)


def test_the_passes_of_guidance_have_choices_of_their_own(make_wan, wan_inputs, chosen):
    together, alone = (apply_blade(make_wan(), config(2)) for _ in range(2))
    prompt, negative = wan_inputs(), wan_inputs(seed=1)
    expected = [passes(alone, prompt, step) for step in (0, 1)]
    chosen.clear()
    found = [(passes(together, prompt, step), passes(together, negative, step))[0] for step in (0, 1)]
    assert all(map(torch.equal, found, expected)) and len(chosen) == 6


def test_a_condition_that_is_made_anew_gets_another_choice(make_wan, wan_inputs, chosen):
    transformer, inputs = apply_blade(make_wan(), config(4)), wan_inputs()
    for step in range(3):
        passes(transformer, {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone()}, step)
    assert len(chosen) == 9


def test_another_size_or_batch_gets_another_choice(make_wan, wan_inputs, chosen):
    transformer = apply_blade(make_wan(), config(4))
    inputs, larger = wan_inputs(), wan_inputs(grid=(4, 5, 7))
    larger["encoder_hidden_states"] = inputs["encoder_hidden_states"]
    passes(transformer, inputs, 0)
    passes(transformer, larger, 1)
    two = {name: value.expand(2, *value.shape[1:]) for name, value in inputs.items()}
    two["encoder_hidden_states"] = inputs["encoder_hidden_states"]
    passes(transformer, {**two, "encoder_hidden_states": two["encoder_hidden_states"].expand(2, -1, -1)}, 1)
    assert len(chosen) == 9
    choices = KeptChoices(4)
    first = choices.of_pass(condition := torch.zeros(1), None, PLAN, batch=1, step=0)
    assert choices.of_pass(condition, None, PLAN, batch=2, step=1) is not first


def test_a_run_that_was_stopped_leaves_nothing_to_the_next(make_wan, wan_inputs, chosen):
    transformer, inputs = apply_blade(make_wan(), config(4, dense_steps=2)), wan_inputs()
    for step in range(4):
        passes(transformer, inputs, step)  # and no more
    chosen.clear()
    for step in range(4):
        passes(transformer, inputs, step)
    assert len(chosen) == 3


def test_a_run_that_begins_where_another_was_stopped_has_a_schedule_of_its_own():
    choices, condition, schedules = KeptChoices(4), torch.zeros(1), [torch.arange(9), torch.arange(9)]
    first = choices.of_pass(condition, schedules[0], PLAN, batch=1, step=4)
    assert choices.of_pass(condition, schedules[0], PLAN, batch=1, step=5) is first
    assert choices.of_pass(condition, schedules[1], PLAN, batch=1, step=5) is not first
    # once more at the first step: perhaps another run
    choices = KeptChoices(4)
    first = choices.of_pass(condition, None, PLAN, batch=1, step=4)
    assert choices.of_pass(condition, None, PLAN, batch=1, step=4) is not first


def test_nothing_is_kept_past_its_steps_its_condition_or_the_run(make_wan, wan_inputs):
    choices = KeptChoices(2)
    condition = torch.zeros(1)
    choices.of_pass(condition, None, PLAN, batch=1, step=0)
    del condition
    gc.collect()
    choices.of_pass(torch.zeros(1), None, PLAN, batch=1, step=0)
    assert len(choices._choices) == 1
    choices.begin_step(2)
    assert not choices._choices
    transformer = apply_blade(make_wan(), config(2))
    passes(transformer, wan_inputs(), 0)
    applied = applied_to(transformer)
    applied.reset_state(transformer)
    assert not applied._choices._choices


def test_two_experts_make_choices_of_their_own(make_wan, wan_inputs, chosen):
    first, second = (apply_blade(make_wan(seed=seed), config(4)) for seed in range(2))
    inputs = wan_inputs()
    for step in range(6):
        passes(first if step < 3 else second, inputs, step)
    assert len(chosen) == 6  # the second at step 3, its first one


def test_training_chooses_at_every_step(make_wan, wan_inputs, chosen):
    transformer, inputs = apply_blade(make_wan(), config(4)), wan_inputs()
    for step in range(2):
        applied_to(transformer).steps.fixed = step, 12
        transformer(**inputs).sample.sum().backward()
    assert len(chosen) == 6


@pytest.mark.parametrize(
    "name", ["WanPipeline", "CogVideoXPipeline", "HunyuanVideoPipeline", "HunyuanVideo15Pipeline", "LTXPipeline"]
)
def test_pipelines_keep_choices_from_step_to_step(small_pipelines, chosen, name):
    """Of three steps, the first two share a choice; a second run makes its own."""
    pipe = small_pipelines[name]()
    pipe.set_progress_bar_config(disable=True)
    options = {"prompt": "", "output_type": "latent"}

    def videos():
        torch.manual_seed(0)
        return [pipe(**options, generator=torch.Generator().manual_seed(seed))[0] for seed in (0, 0)]

    counts = {}
    for steps in (1, 2):
        chosen.clear()
        apply_blade(pipe, config(steps))
        first = videos()
        counts[steps] = len(chosen)
        assert all(map(torch.equal, first, videos()))  # the same again
    assert counts[2] > 0 and 3 * counts[2] == 2 * counts[1]
    remove_blade(pipe)


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="`reselect_every` must be"):
        AdaptiveConfig(reselect_every=0)
