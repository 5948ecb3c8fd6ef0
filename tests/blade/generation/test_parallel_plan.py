"""Plans of runs that several processes make together: work, memory and bytes of each, and seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from card_reports import SIZE, make_report

from blade.attention.config import BladeConfig
from blade.attention.pattern_plan import PatternPlan
from blade.attention.pattern_table import PatternTable
from blade.attention.patterns import HeadPattern
from blade.cli.generate import main
from blade.common.machine import GIB
from blade.generation.parallel_plan import even_heads, rank_activations_gib, rank_cost
from blade.generation.parallel_traffic import LATENCY, LINK_SHARE, PassShape, Traffic
from blade.generation.plan import plan_run
from blade.generation.request import GenerationRequest
from blade.models.cards import Link, find_card
from blade.models.communication import SplitPass
from blade.models.costs import ForwardCost, run_cost
from blade.models.loading import load_empty_model
from blade.token_grid import TokenGrid

LINK = Link(name="a link", gb_per_second=10.0, source="")


def bundled(**changes) -> GenerationRequest:
    given = {"prompt": "a red ball moving right", "attention": "dense", "steps": 2, "guidance_scale": 5.0}
    return GenerationRequest(**{**given, **SIZE, "device": "cpu", **changes})


def forward_of(heads: int = 12) -> ForwardCost:
    flops = {"self-attention": 1200, "other attention": 96, "linear layers": 960, "convolutions": 8}
    return ForwardCost(
        grid=TokenGrid(21, 30, 52), layers=30, heads=heads, head_dim=128, parameters=1, flops=dict(flops)
    )


def adaptive(**changes) -> BladeConfig:
    config = BladeConfig(sparsity=0.7, dense_layers=(0,), dense_steps=1)
    return replace(config, asa=replace(config.asa, block_size=64, budget="layer", **changes))


def shape_of(
    *, batches: tuple[int, ...] = (1, 1), steps: int = 4, skipped_steps: int = 0, **whole: float
) -> PassShape:
    return PassShape(
        steps=steps, skipped_steps=skipped_steps, batches=batches, text_apart=False, element_size=2, out_channels=64,
        cut_keys=(), table_bytes=0, embeds_whole=True,
        whole={name.replace("_", " "): count for name, count in whole.items()},
    )  # fmt: skip


def test_uneven_heads_cost_attention_a_quarter() -> None:
    cost, shape = run_cost(forward_of(), 4), shape_of()
    traffic = Traffic.of(cost, None, shape, 8)
    assert traffic.largest.heads[0] == (2, 2, 2, 2, 1, 1, 1, 1) and even_heads(traffic.largest) == 0.75
    rank = rank_cost(cost, traffic, shape)
    assert rank.flops["self-attention"] * 8 * 0.75 == pytest.approx(cost.flops["self-attention"])
    for part in ("linear layers", "other attention"):
        assert rank.flops[part] * 8 == pytest.approx(cost.flops[part]), part
    assert rank.flops["convolutions"] == cost.flops["convolutions"]
    whole = rank_cost(cost, traffic, shape_of(linear_layers=160.0, other_attention=96.0))
    assert whole.flops["linear layers"] == pytest.approx(8 * (160 + 800 / 8))  # of eight passes
    assert whole.flops["other attention"] == cost.flops["other attention"]


def test_the_sparse_part_of_a_rank_is_its_heads() -> None:
    cost, shape = run_cost(forward_of(), 4, config=adaptive()), shape_of()
    rank = rank_cost(cost, Traffic.of(cost, adaptive(), shape, 8), shape)
    assert rank.sparse_self_attention == pytest.approx(cost.sparse_self_attention / 6)
    assert rank.flops["self-attention"] == pytest.approx(cost.flops["self-attention"] / 6)
    assert rank.flops["block selection"] == pytest.approx(cost.flops["block selection"] / 6) != 0


def test_scores_are_gathered_where_blocks_are_chosen() -> None:
    cost, shape = run_cost(forward_of(), 10, config=adaptive(reselect_every=4)), shape_of(steps=10)
    traffic = Traffic.of(cost, adaptive(reselect_every=4), shape, 8)
    (plain_steps, plain), (choosing_steps, choosing) = traffic.steps
    assert (plain_steps, choosing_steps) == (7, 3)  # 9 sparse steps
    assert choosing[0].score_blocks == 512 and choosing[0].scored_layers == tuple(range(1, 30))
    scores = 7 * 2 * 29 * 512**2 * 4  # two heads of 29 layers, to seven others
    assert plain[0].sent() == tuple(sent - scores for sent in choosing[0].sent())
    expected = [14 * sent + 6 * more for sent, more in zip(plain[0].sent(), choosing[0].sent())]
    assert traffic.sent() == tuple(expected)
    for changes in ({"budget": "row"}, {"selector": "local"}):  # which scores all heads alike
        other = replace(adaptive(), asa=replace(adaptive().asa, **changes))
        assert len(Traffic.of(cost, other, shape, 8).steps) == 1
    assert len(Traffic.of(run_cost(forward_of(), 10), None, shape, 8).steps) == 1


def test_every_call_of_a_step_is_counted() -> None:
    cost = run_cost(forward_of(), 5, guidance_passes=4)
    calls = Traffic.of(cost, None, shape_of(batches=(2, 1, 1), steps=5), 8)
    assert [(count, [split.batch for split in step]) for count, step in calls.steps] == [(5, [2, 1, 1])]
    together = Traffic.of(cost, None, shape_of(batches=(4,), steps=5), 8)
    densities = 7 * 4 * 30  # bytes, which do not grow with the batch
    assert calls.sent()[0] - together.sent()[0] == 5 * 2 * densities
    assert calls.seconds(LINK) - together.seconds(LINK) == pytest.approx(
        5 * 2 * (62 * LATENCY + densities / (1e10 * LINK_SHARE))
    )


def test_seconds_follow_the_busiest_link() -> None:
    cost = run_cost(replace(forward_of(heads=3), layers=1), 1, guidance=False)
    traffic = Traffic.of(cost, None, shape_of(batches=(1,), steps=1), 2)
    exchanged = 16380 * 2 * 128 * 2  # of two heads: received before attention, sent after it
    counts = [3 * exchanged, exchanged, 16380 * 64 * 2, 4]
    assert traffic.seconds(LINK) == pytest.approx(4 * LATENCY + sum(counts) / (10e9 * LINK_SHARE))


def patterned(expensive: tuple[int, ...]) -> BladeConfig:
    """Return a table in which some heads of the second half of the steps are full, and the others diagonal."""
    assignment = np.zeros((2, 3, 12), dtype=np.int64)
    assignment[1][:, list(expensive)] = 1
    table = PatternTable(
        patterns=(HeadPattern(kind="diagonal", frames=1.0), HeadPattern(kind="full")), assignment=assignment,
        block_size=64, token_order="raster", group_starts=(0, 2), steps=5,
    )  # fmt: skip
    return BladeConfig(attention="patterns", patterns=table, dense_layers=(0,), dense_steps=1)


def test_heads_of_patterns_are_dealt_by_cost() -> None:
    forward, config, shape = replace(forward_of(), layers=3), patterned((0, 1)), shape_of(steps=5)
    cost = run_cost(forward, 5, config=config)
    traffic = Traffic.of(cost, config, shape, 4)
    assert [count for count, _ in traffic.steps] == [1, 1, 3]  # dense, and those of each half of the steps
    (_, alike), (_, dealt) = traffic.steps[1:]
    assert alike[0].heads == ((3,) * 4,) * 3
    assert dealt[0].heads[0] == (3,) * 4 and sorted(dealt[0].heads[1]) == [1, 1, 5, 5]
    costs = PatternPlan.of(config, forward.grid, torch.device("cpu")).pattern_costs()
    slow = 2 * (1 * 3 * costs[0] + 3 * max(costs[1], 5 * costs[0]))
    whole = 2 * (1 * 12 * costs[0] + 3 * (2 * costs[1] + 10 * costs[0]))
    assert traffic.sparse_share == pytest.approx(slow / whole)
    rank = rank_cost(cost, traffic, shape)
    # operations of a pass are whole numbers
    assert rank.sparse_self_attention == pytest.approx(cost.sparse_self_attention * slow / whole, rel=2e-3)


def test_memory_of_a_rank() -> None:
    sizes = {"batch": 1, "heads": 4, "layers": 2, "head_dim": 16, "element_size": 2, "out_channels": 8}
    split = SplitPass.equal(TokenGrid(1, 8, 10), ranks=4, score_blocks=5, scored_layers=(1,), **sizes)
    tensor, embedded, scores = 20 * 4 * 16 * 2, 80 * 4 * 16 * 2, 4 * 25 * 4
    shape, tables = shape_of(), replace(shape_of(), table_bytes=1000)
    assert rank_activations_gib(0.0, split, tables) * GIB == pytest.approx(14 * tensor + embedded + scores + 250)
    assert rank_activations_gib(1.0, split, shape) * GIB == pytest.approx(GIB / 4 + embedded + scores)
    cut = replace(shape, embeds_whole=False)
    assert rank_activations_gib(1.0, split, cut) * GIB == pytest.approx(GIB / 4 + scores)
    assert rank_activations_gib(1.0, SplitPass.equal(TokenGrid(1, 8, 10), ranks=1, **sizes), tables) == 1.0


def test_one_process_is_the_run_itself() -> None:
    plan = plan_run(bundled(), card="H200", parallel=1)
    assert plan.parallel is not None and plan.parallel.prediction is not None
    assert plan.parallel.traffic.sent() == (0,)
    assert plan.parallel.prediction.efficiency == pytest.approx(1.0)
    assert plan.parallel.needed_gib == pytest.approx(plan.needed_gib)


def test_three_processes_of_the_bundled_model() -> None:
    plan = plan_run(bundled(dtype="bfloat16"), card="H200", parallel=3)
    parallel, model = plan.parallel, load_empty_model(dtype=torch.bfloat16)
    assert parallel is not None and parallel.prediction is not None and plan.prediction is not None
    config, grid = model.transformer.config, plan.cost.forward.grid
    split, passes = parallel.traffic.largest, plan.cost.passes
    width, tokens = config.num_attention_heads * config.attention_head_dim, grid.video_tokens // 3
    assert split.tokens == (tokens,) * 3 and split.out_channels == config.out_channels
    layer = (3 * tokens * width * 2 // 3 + 2 * tokens * width // 3) * 2
    assert split.layer_sent(0) == (layer,) * 3
    run = passes * (config.num_layers * (layer + 2 * 4) + 2 * tokens * config.out_channels * 2)
    assert parallel.traffic.sent() == (run,) * 3
    seconds = [prediction.seconds["transformer"] for prediction in (plan.prediction, parallel.prediction.rank)]
    whole = 989.5e12 * (seconds[1] - seconds[0] / 3) * 3 / 2 - plan.cost.flops["convolutions"]
    length = model.example_inputs(model.latent_size(*SIZE.values()))["encoder_hidden_states"].shape[1]
    text = config.text_dim * width + width**2 + 2 * config.num_layers * width**2
    time = config.freq_dim * width + 7 * width**2
    assert whole == pytest.approx(passes * 2 * (length * text + time))
    shown = str(plan)
    assert f"3 processes of at most {tokens} tokens and 1 of 3 heads" in shown and "efficiency of" not in shown
    assert "assumed: 80 % of it, 30 µs an operation, nothing computed meanwhile)" in shown
    together = parallel.prediction.rank.total + parallel.prediction.waiting
    assert parallel.prediction.efficiency == pytest.approx(plan.prediction.total / together / 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel": 0}, "`parallel` must be"),
        ({"parallel": 5}, "`parallel` must be at most the model's 3 heads, got 5"),
        ({"parallel": 2, "memory_gib": 24.0}, "`memory` must not be given with `parallel`"),
    ],
)
def test_what_cannot_be_planned_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        plan_run(bundled(), **options)


@pytest.mark.slow
def test_a_model_without_a_plan_is_refused() -> None:
    request = bundled(model="nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers", height=256, width=256, frames=5)
    with pytest.raises(ValueError, match=r"`parallel` must be 1 for a .*, as there is no plan for its sequence"):
        plan_run(request, parallel=2)


@pytest.mark.slow
def test_a_report_of_a_card_whose_link_is_not_known(tmp_path: Path) -> None:
    report = make_report()
    path = tmp_path / "card.json"
    path.write_text(json.dumps(report))
    assert "no prediction: nothing is known of what connects several of a card" in str(
        plan_run(bundled(), card=str(path), parallel=2)
    )
    report["machine"]["device"] = "NVIDIA H200"
    path.write_text(json.dumps(report))
    plan = plan_run(bundled(), card=str(path), parallel=2)
    assert plan.parallel is not None and plan.parallel.prediction is not None
    assert plan.parallel.prediction.link == find_card("H200").link
    assert plan.parallel.prediction.rank.rates.measured
    report["steps"] = [step for step in report["steps"] if step["part"] != "attention"]
    path.write_text(json.dumps(report))
    lacking = str(plan_run(bundled(), card=str(path), parallel=2))
    assert "no prediction: the report has no speed of dense attention" in lacking


def test_the_command_plans_several_processes(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["a red ball moving right", "--student", "none", "--height=64", "--width=64", "--frames=9", "--steps=2"]
    with pytest.raises(SystemExit) as ended:
        main([*line, "--dry-run", "--parallel", "2"])
    shown = capsys.readouterr().out
    assert not ended.value.code and "parallel    2 processes of at most 96 tokens" in shown
    assert "2 of 3 heads, so that attention is split with an efficiency of 75 %" in shown
    assert "            each sends at most " in shown and "times as fast" not in shown
