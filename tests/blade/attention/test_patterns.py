"""Head patterns against their definition by pairs of tokens, their closed formulas, and head by head."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import block_sparse_attention

from blade import BladeConfig, TokenGrid, apply_blade, blade_summary, remove_blade
from blade.attention.config import AdaptiveConfig
from blade.attention.pattern_plan import PatternPlan, pattern_tables
from blade.attention.pattern_table import PatternTable, mixed_table, uniform_table
from blade.attention.patterns import HeadPattern, Window, half_width, pattern_blocks

ORDERS = ("raster", "token-major", "gilbert", "bricks(2,2,2)")
PATTERNS = (
    HeadPattern(kind="full"),
    HeadPattern(kind="skip"),
    HeadPattern(kind="diagonal", frames=0.5),
    HeadPattern(kind="multi-diagonal", frames=0.6, first_frame=True),
    HeadPattern(kind="vertical", share=0.3),
    HeadPattern(kind="window", windows={"frame": Window(width=2), "column": Window(width=2, offset=1, stride=3)}),
    HeadPattern(kind="window", windows={"place": Window(width=3)}),
    HeadPattern(kind="diagonal", frames=0.0),
)


def pairs(pattern, grid, block_size):
    """Whether each pair of video tokens, in raster order, is one of the pattern's: by hand."""
    frame, row, column = grid.positions("raster").unbind(-1)
    place = row * grid.width + column
    if pattern.kind in ("diagonal", "multi-diagonal"):
        number = (
            frame * grid.height * grid.width + place if pattern.kind == "diagonal" else place * grid.frames + frame
        )
        keep = (number[:, None] - number).abs() <= half_width(pattern, grid, block_size)
    else:
        keep = torch.ones(grid.video_tokens, grid.video_tokens, dtype=torch.bool)
        for axis, window in pattern.windows.items():
            at = {"frame": frame, "row": row, "column": column, "place": place}[axis]
            distance = ((at[:, None] - at).abs() - window.offset).abs()
            keep &= (distance if window.stride is None else distance % window.stride) < window.width
    return keep | (frame == 0) if pattern.first_frame else keep


@pytest.mark.parametrize(
    "grid", [TokenGrid(3, 5, 7), TokenGrid(4, 3, 6, text_before=5), TokenGrid(2, 4, 7, text_after=9)]
)
@pytest.mark.parametrize("pattern", [PATTERNS[i] for i in (2, 3, 5, 6)], ids=lambda pattern: pattern.name)
@pytest.mark.parametrize("order", ORDERS)
def test_a_block_is_kept_if_it_holds_a_pair(pattern, grid, order):
    size, tokens = 8, grid.sequence_length
    blocks = -(-tokens // size)
    seen = torch.ones(blocks * size, blocks * size, dtype=torch.bool)
    seen[tokens:], seen[:, tokens:] = False, False
    video, permutation = slice(grid.video_start, grid.video_stop), grid.order(order)
    seen[video, video] = pairs(pattern, grid, size)[permutation][:, permutation]
    expected = seen.view(blocks, size, blocks, size).any(-1).any(1)
    text = torch.tensor(grid.text_blocks(size))
    expected |= text | text[:, None]
    assert torch.equal(pattern_blocks(pattern, grid, size, order), expected)


MODELS = [
    TokenGrid(21, 45, 80), TokenGrid(33, 45, 80), TokenGrid(33, 45, 80, text_after=256), TokenGrid(11, 48, 85),
    TokenGrid(11, 48, 85, text_after=226),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("grid", MODELS, ids=["Wan", "Hunyuan", "Hunyuan, text", "CogVideoX", "CogVideoX, text"])
@pytest.mark.parametrize("frames", [0.5, 2])
def test_counts_are_those_of_the_closed_formulas(grid, frames):
    """Sparse-vDiT: a band keeps n(2w + 1) - w(w + 1) blocks of n x n, a stripe |C| n; text its rows and columns."""
    size = 128
    text = sum(grid.text_blocks(size))
    n, w = -(-grid.sequence_length // size) - text, math.floor(frames * grid.height * grid.width / size)
    of_text = 2 * n * text + text**2
    for kind, order in (("diagonal", "raster"), ("multi-diagonal", "token-major")):
        keep = pattern_blocks(HeadPattern(kind=kind, frames=frames), grid, size, order)
        assert int(keep.sum()) == n * (2 * w + 1) - w * (w + 1) + of_text
    keep = pattern_blocks(HeadPattern(kind="vertical", key_blocks=(0, 5, 9)), grid, size, "raster")
    assert int(keep.sum()) == 3 * n + of_text


def test_multi_diagonal_is_permute_band_and_unpermute():
    grid, size = TokenGrid(3, 5, 7), 8
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, grid.video_tokens, 1, 8).unbind(0)
    pattern = HeadPattern(kind="multi-diagonal", frames=0.6, order="token-major")
    config = BladeConfig(attention="patterns", patterns=uniform_table(pattern, 1, 1, block_size=size))
    plan = PatternPlan.of(config, grid, torch.device("cpu"))
    output, _, _ = plan.attend(query, key, value, (torch.zeros(1),))
    order, inverse = grid.order("token-major"), grid.inverse_order("token-major")
    reach = half_width(pattern, grid, size) // size
    numbers = torch.arange(-(-grid.video_tokens // size))
    band = BlockMask.from_dense(((numbers[:, None] - numbers).abs() <= reach)[None, None], (size, size))
    moved = (x.index_select(1, order) for x in (query, key, value))
    expected = block_sparse_attention(*moved, band, implementation="naive").index_select(1, inverse)
    torch.testing.assert_close(output, expected)


MIXED = (*PATTERNS, HeadPattern(kind="diagonal", frames=1, order="gilbert"))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["cpu", "flex", "triton"])
@pytest.mark.parametrize("grid", [TokenGrid(3, 5, 7), TokenGrid(3, 5, 7, text_after=9)])
def test_one_launch_for_a_mix_equals_head_by_head(implementation, grid):
    if implementation == "triton":
        pytest.importorskip("triton")
    size, head_dim = {"cpu": (8, 16), "flex": (8, 32), "triton": (32, 64)}[implementation]
    heads = len(MIXED)
    torch.manual_seed(0)
    inputs = torch.randn(3, 1, grid.sequence_length, heads, head_dim).unbind(0)
    table = mixed_table(MIXED, 1, heads, block_size=size, token_order="bricks(2,2,2)")
    config = BladeConfig(attention="patterns", patterns=table, implementation=implementation)
    plan = PatternPlan.of(config, grid, torch.device("cpu"))
    try:
        output, density, used = plan.attend(*inputs, pattern_tables(config, 0, heads, 1)[0:1][0].unbind(0))
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    assert used == implementation
    shares = []
    for head, pattern in enumerate(MIXED):
        order = pattern.order or "bricks(2,2,2)"
        places = torch.arange(grid.sequence_length)
        inner = grid.inverse_order("bricks(2,2,2)")[grid.order(order)]  # places in the model's order
        places[grid.video_start : grid.video_stop] = inner + grid.video_start
        mask = BlockMask.from_dense(pattern_blocks(pattern, grid, size, order)[None, None], (size, size))
        shares.append(mask.density(grid.sequence_length, grid.sequence_length))
        one = (x[:, places, head : head + 1] for x in inputs)
        expected = block_sparse_attention(*one, mask, implementation="naive")
        torch.testing.assert_close(output[:, places, head : head + 1], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(density, torch.stack(shares).mean())


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs).sample


def test_all_full_is_bitwise_the_dense_output_and_windows_over_everything_nearly(make_wan, wan_inputs):
    transformer, inputs = make_wan(), wan_inputs()
    plain = run(transformer, inputs)
    table = uniform_table(HeadPattern(kind="full"), 3, 2, block_size=8)
    apply_blade(transformer, BladeConfig(attention="patterns", patterns=table))
    assert torch.equal(run(transformer, inputs), plain)
    assert blade_summary(transformer).run_density == 1.0
    everything = (HeadPattern(kind="diagonal", frames=9), HeadPattern(kind="vertical", share=1.0, order="gilbert"))
    table = mixed_table(everything, 3, 2, block_size=8, token_order="token-major")
    apply_blade(transformer, BladeConfig(attention="patterns", patterns=table))
    torch.testing.assert_close(run(transformer, inputs), plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(run(remove_blade(transformer), inputs), plain)


def test_adaptive_heads_and_patterns_share_a_layer(make_wan, wan_inputs):
    transformer, inputs = make_wan(), wan_inputs()
    details = AdaptiveConfig(probe_tokens=4, budget="layer")  # which is for the rows here: not all heads choose
    densities = []
    for kinds in (("asa", "asa"), ("skip", "skip"), ("asa", "skip")):
        table = mixed_table([HeadPattern(kind=kind) for kind in kinds], 3, 2, block_size=8, token_order="gilbert")
        config = BladeConfig(attention="patterns", patterns=table, sparsity=0.5, asa=details)
        apply_blade(transformer, config)
        run(transformer, inputs)
        densities.append(blade_summary(transformer).layer_density)
    assert densities[1] == 0
    # heads differ by whether they chose the last block, which is shorter
    assert densities[0] > 0.3 and densities[2] == pytest.approx(densities[0] / 2, rel=0.02)
    adaptive = BladeConfig(sparsity=0.5, asa=AdaptiveConfig(block_size=8, probe_tokens=4))
    expected = run(apply_blade(transformer, adaptive), inputs)
    table = uniform_table(HeadPattern(kind="asa"), 3, 2, block_size=8, token_order="gilbert")
    apply_blade(transformer, BladeConfig(attention="patterns", patterns=table, sparsity=0.5, asa=details))
    torch.testing.assert_close(run(transformer, inputs), expected)


def table_of(**changes):
    values = {
        "patterns": PATTERNS[:4],
        "assignment": torch.arange(24).view(2, 3, 4).numpy() % 4,
        "block_size": 8,
        "steps": 6,
        "group_starts": (0, 2),
        "grid": TokenGrid(3, 5, 7),
    }
    return PatternTable(**{**values, **changes})


def test_a_table_is_saved_and_read_with_its_configuration(tmp_path):
    config = BladeConfig(attention="patterns", patterns=table_of(), dense_steps=1)
    config.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blade_config.json", "pattern_table.json"]
    assert BladeConfig.from_pretrained(tmp_path) == config
    assert BladeConfig.from_dict(config.to_dict()) == config
    (tmp_path / "pattern_table.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        BladeConfig.from_pretrained(tmp_path)
    (tmp_path / "pattern_table.json").unlink()
    with pytest.raises(ValueError, match="has its table beside it"):
        BladeConfig.from_pretrained(tmp_path)


def test_steps_fall_into_groups_and_other_lengths_by_their_share():
    table = table_of()
    assert table.by_step(6).tolist() == [0, 0, 1, 1, 1, 1]
    assert table.by_step(3).tolist() == [0, 1, 1]
    assert sum(table.shares().values()) == pytest.approx(1)


def test_a_run_that_the_table_was_not_found_for_is_refused_unless_asked_for(make_wan, wan_inputs):
    transformer, inputs = make_wan(heads=4), wan_inputs((3, 4, 7))
    with pytest.raises(ValueError, match="3 layers of 2 heads, not 3 of 4"):
        apply_blade(make_wan(), BladeConfig(attention="patterns", patterns=table_of()))
    apply_blade(transformer, BladeConfig(attention="patterns", patterns=table_of()))
    with pytest.raises(ValueError, match=r"3 x 4 x 7 tokens, not 3 x 5 x 7 tokens.*adapt_patterns"):
        run(transformer, inputs)
    apply_blade(transformer, BladeConfig(attention="patterns", patterns=table_of(), adapt_patterns=True))
    assert run(transformer, inputs).isfinite().all()


BAD = [
    ({"kind": "zigzag"}, '`kind` must be one of "full", "skip"'),
    ({"kind": "diagonal"}, "`frames` belongs to diagonal"),
    ({"kind": "vertical", "share": 0.0}, r"`share` must be in \(0, 1\]"),
    ({"kind": "vertical"}, "`share` or `key_blocks`, one of them"),
    ({"kind": "window"}, "`windows` belongs to window"),
    ({"kind": "full", "order": "raster"}, "`order` must be None with full"),
    ({"kind": "skip", "first_frame": True}, "`first_frame` must be False with skip"),
    ({"kind": "diagonal", "frames": 1, "order": "spiral"}, "`token_order` must be one of"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_bad_patterns_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        HeadPattern(**values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_starts": (0, 0)}, "`group_starts` must be 2 rising steps"),
        ({"steps": None}, "`steps` must be given"),
        ({"patterns": PATTERNS[:2]}, "`assignment` must be of the 2 patterns"),
        ({"patterns": (*PATTERNS[:3], HeadPattern(kind="vertical", key_blocks=(1,))), "grid": None}, "`grid` must be"),
    ],
)
def test_bad_tables_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        table_of(**changes)


def test_patterns_are_equal_if_they_say_the_same():
    for one, other in itertools.product(PATTERNS, repeat=2):
        assert (HeadPattern.from_dict(one.to_dict()) == other) == (one is other)


def test_old_spellings_are_read_and_new_ones_written(tmp_path):
    old = HeadPattern.from_dict({"kind": "multi_diagonal", "frames": 0.6, "order": "token_major"})
    assert old == HeadPattern(kind="multi-diagonal", frames=0.6, order="token-major")
    assert old.to_dict() == {"kind": "multi-diagonal", "frames": 0.6, "order": "token-major"}
    table = mixed_table([old, HeadPattern(kind="full")], 2, 2, block_size=8, token_order="token-major")
    values = json.loads(json.dumps(table.to_dict()).replace("-", "_"))
    assert values["token_order"] == "token_major" and values["patterns"][0]["kind"] == "multi_diagonal"
    (tmp_path / "pattern_table.json").write_text(json.dumps(values))
    assert PatternTable.load(tmp_path / "pattern_table.json") == table
    assert AdaptiveConfig(token_order="token_major") == AdaptiveConfig(token_order="token-major")


RESULTS = Path(__file__).parents[3] / "docs" / "results" / "shapes-patterns" / "tables"


@pytest.mark.parametrize("folder", sorted(path.name for path in RESULTS.iterdir()))
def test_tables_of_an_earlier_version_are_read(folder, tmp_path):
    config = BladeConfig.from_pretrained(RESULTS / folder)
    text = (RESULTS / folder / "pattern_table.json").read_text()
    assert "multi-diagonal" in config.patterns.shares()
    config.save_pretrained(tmp_path)
    respelled = text.replace("multi_diagonal", "multi-diagonal").replace("token_major", "token-major")
    assert json.loads((tmp_path / "pattern_table.json").read_text()) == json.loads(respelled)
