"""What is measured in a layer against plain attention, and recordings that go on where they were stopped."""

import pytest
import torch

from blade import BladeConfig, TokenGrid, apply_blade
from blade.attention.config import AdaptiveConfig
from blade.attention.patterns import HeadPattern, Window, pattern_blocks
from blade.profiling.candidates import default_candidates
from blade.profiling.measure import Candidates, column_mass, measure_layer
from blade.profiling.recording import read_pass, recorded
from blade.profiling.recording_plan import Recording

PATTERNS = (
    HeadPattern(kind="full"),
    HeadPattern(kind="skip"),
    HeadPattern(kind="diagonal", frames=0.5),
    HeadPattern(kind="vertical", share=0.3),
    HeadPattern(kind="window", windows={"place": Window(width=3)}),
)


@pytest.mark.parametrize("lengths", [None, (109, 106)])
def test_errors_and_masses_are_those_of_plain_attention(lengths, monkeypatch):
    monkeypatch.setattr("blade.profiling.measure.CHUNK_BYTES", 40_000)  # several chunks
    torch.manual_seed(0)
    grid, batch, heads, size = TokenGrid(3, 5, 7, text_after=4), 2, 3, 8
    tokens = grid.sequence_length
    query, key, value = torch.randn(3, batch, tokens, heads, size).unbind(0)
    projection = torch.randn(12, heads * size)
    masks = torch.stack([pattern_blocks(pattern, grid, 8, "raster") for pattern in PATTERNS])
    found = measure_layer(
        query, key, value, [Candidates(numbers=tuple(range(5)), masks=tuple(masks[:, None]))], candidates=5,
        block_size=8, projection=projection, key_lengths=None if lengths is None else torch.tensor(lengths),
    )  # fmt: skip
    assert found.queries == sum(lengths or (tokens, tokens))
    expected = torch.zeros(3, 5, heads)
    for item, stop in enumerate(lengths or (tokens, tokens)):
        logits = torch.einsum("shd,thd->hst", query[item], key[item])[:, :stop, :stop] * size**-0.5
        weights, values = logits.softmax(-1), value[item, :stop]
        exact = torch.einsum("hst,thd->hsd", weights, values)
        for number, mask in enumerate(masks):
            seen = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)[:stop, :stop]
            sparse = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
            error = torch.einsum("hst,thd->hsd", sparse, values) - exact
            projected = torch.einsum("hsd,ehd->hse", error, projection.unflatten(1, (heads, size)))
            expected[0, number] += projected.square().mean(-1).sum(1)
            expected[1, number] += error.square().mean(-1).sum(1)
            expected[2, number] += (weights * seen).sum((1, 2))
    for number, name in enumerate(("output_error", "head_error", "mass")):
        torch.testing.assert_close(getattr(found, name).float(), expected[number], rtol=1e-4, atol=1e-4)
    assert (found.mass <= found.best_mass + 1e-6).all()
    torch.testing.assert_close(found.block_map.sum((1, 2)).float(), torch.full((heads,), float(found.queries)))
    torch.testing.assert_close(found.energy, found.output_error[1])


def test_columns_that_attract_are_seen(monkeypatch):
    query, key = torch.ones(1, 64, 2, 8), torch.zeros(1, 64, 2, 8)
    key[:, 16:24] = 2.0
    mass = column_mass(query, key, 8)
    assert mass.argmax(-1).tolist() == [2, 2] and (mass[:, 2] > 0.9).all()
    monkeypatch.setattr("blade.profiling.measure.CHUNK_BYTES", 5000)  # a few queries at a time
    torch.testing.assert_close(column_mass(query, key, 8), mass)


def test_candidates_come_to_the_densities_asked_for():
    grid = TokenGrid(9, 12, 12)
    found = default_candidates(grid, 32, densities=(0.2, 0.5))
    assert [pattern.kind for pattern in found[:2]] == ["full", "skip"]
    assert next(one for one in found if one.kind == "multi-diagonal").order == "token-major"
    for number, pattern in enumerate(found[2:]):
        density = float(pattern_blocks(pattern, grid, 32, "raster").float().mean())
        assert density <= (0.2, 0.5)[number % 2] + 0.013, pattern  # a stripe more or less, of 41


def test_a_recording_goes_on_where_it_was_stopped(make_wan, wan_inputs, tmp_path):
    transformer = make_wan()
    grid = TokenGrid(3, 5, 7)
    recording = Recording(
        candidates=default_candidates(grid, 8),
        block_size=8,
        sampled_blocks=6,
        adaptive=(BladeConfig(asa=AdaptiveConfig(block_size=8, probe_tokens=4)),),
    )
    inputs = [wan_inputs(timestep=timestep) for timestep in (900.0, 600.0, 300.0)]

    def run():
        passes = []
        with (
            torch.no_grad(),
            recorded(transformer, recording, tmp_path, on_pass=lambda *done: passes.append(done[:2])),
        ):
            outputs = [transformer(**one).sample for one in inputs]
        return outputs, passes

    with torch.no_grad():
        plain = [transformer(**one).sample for one in inputs]
    outputs, passes = run()
    assert passes == [(0, False), (1, False), (2, False)]
    for one, other in zip(outputs, plain):
        torch.testing.assert_close(one, other)
    before = read_pass(tmp_path / "pass-00002.safetensors")
    (tmp_path / "pass-00002.safetensors").unlink()
    again, passes = run()
    assert passes == [(0, True), (1, True), (2, False)]
    assert all(torch.equal(one, other) for one, other in zip(outputs, again))
    after = read_pass(tmp_path / "pass-00002.safetensors")
    assert sorted(before.layers) == [0, 1, 2] and before.layers[1].queries == after.layers[1].queries <= 6 * 8
    assert torch.equal(before.layers[1].output_error, after.layers[1].output_error)
    assert torch.equal(before.columns[2], after.columns[2])
    assert before.layers[0].mass.shape == (recording.measured, 2)
    with torch.no_grad():
        assert torch.equal(transformer(**inputs[0]).sample, plain[0])


def test_blade_is_put_back_as_it_was(make_wan, wan_inputs, tmp_path):
    transformer = make_wan()
    apply_blade(transformer, BladeConfig(sparsity=0.7, asa=AdaptiveConfig(block_size=8, probe_tokens=4)))
    recording = Recording(candidates=(HeadPattern(kind="full"), HeadPattern(kind="skip")), block_size=8)
    with torch.no_grad():
        sparse = transformer(**wan_inputs()).sample
        with recorded(transformer, recording, tmp_path):
            recorded_output = transformer(**wan_inputs()).sample
        assert not torch.allclose(recorded_output, sparse, atol=1e-4)
        assert torch.equal(transformer(**wan_inputs()).sample, sparse)


def test_what_is_recorded_is_checked():
    full, asa = HeadPattern(kind="full"), HeadPattern(kind="asa")
    with pytest.raises(ValueError, match="`candidates` must begin with the full pattern"):
        Recording(candidates=(HeadPattern(kind="skip"),), block_size=8)
    with pytest.raises(ValueError, match="`candidates` must be static patterns"):
        Recording(candidates=(full, asa), block_size=8)
    with pytest.raises(ValueError, match="`adaptive` must have blocks of 8 tokens too, got 64"):
        Recording(candidates=(full,), block_size=8, adaptive=(BladeConfig(),))
