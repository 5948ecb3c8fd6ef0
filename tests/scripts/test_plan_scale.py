"""The page on several GPUs has the tables of its record, and the record is what its own facts amount to."""

import importlib.util
import json
from pathlib import Path

import pytest

from blade.attention.head_deal import shares
from blade.models.cards import documented_cards
from blade.models.communication import exchange_heads, exchange_outputs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("plan_scale", ROOT / "scripts" / "plan_scale.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def record():
    return json.loads((ROOT / "docs" / "results" / "scale" / "scale.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page():
    return (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def test_the_page_has_the_tables_of_the_record(script, record, page):
    tables = script.make_tables(record)
    assert script.with_tables(page, tables) == page
    report = (ROOT / "docs" / "results" / "scale" / "scale.md").read_text(encoding="utf-8")
    for lines in tables.values():
        assert "\n".join(lines) in report
    with pytest.raises(ValueError, match="the page must have the lines '<!-- begin table of bytes"):
        script.with_tables("a page", tables)


def test_the_page_names_what_is_assumed(script, record, page):
    assumed = record["assumed"]
    link = documented_cards()[script.CARD].link
    assert (assumed["link_share"], assumed["latency_seconds"]) == (script.LINK_SHARE, script.LATENCY)
    assert (assumed["link"], assumed["gb_per_second"]) == (link.name, link.gb_per_second)
    text = " ".join(page.split())
    for named in (
        f"{100 * script.LINK_SHARE:.0f} % of that",
        f"{1e6 * script.LATENCY:g} µs",
        f"{link.name}, {link.gb_per_second:g} GB/s in each direction",
        "**Not yet measured**",
    ):
        assert named in text, named
    assert "MiniMax-H3's weights, 134 GiB" in text
    assert {f"{run['weights_gib']:.0f}" for run in record["runs"] if "H3" in run["clip"]} == {"134"}


def test_every_clip_is_there_on_every_number_of_gpus(script, record):
    assert [(run["clip"], run["attention"]) for run in record["runs"]] == [
        (clip.title, attention) for clip in script.CLIPS for attention in script.ATTENTIONS
    ]
    assert all([split["gpus"] for split in run["by_gpus"]] == list(script.GPUS) for run in record["runs"])


def test_the_record_follows_from_its_facts(record):
    for run in record["runs"]:
        alone = run["by_gpus"][0]
        assert alone["run_bytes"] == 0 and alone["link_seconds"] == 0
        for split in run["by_gpus"]:
            ranks = split["gpus"]
            seconds = split["transformer_seconds"] + split["link_seconds"] + split["whole_seconds"]
            assert split["clip_seconds"] == pytest.approx(seconds)
            assert split["efficiency"] == pytest.approx(alone["clip_seconds"] / split["clip_seconds"] / ranks)
            assert split["whole_seconds"] == alone["whole_seconds"] > 0
            assert alone["transformer_seconds"] / ranks <= split["transformer_seconds"] * (1 + 1e-9)
            assert split["heads"] == -(-run["heads"] // ranks)


def test_bytes_of_a_dense_layer_are_the_formulas(record):
    for run in record["runs"]:
        if run["attention"] != "dense":
            continue
        video, text = run["video_tokens"], run["text_tokens"]
        for split in run["by_gpus"]:
            ranks, streams = split["gpus"], (video, text) if run["text_apart"] else (video + text,)
            sizes = {
                "batch": max(run["batches"]), "heads": shares(run["heads"], ranks), "head_dim": run["head_dim"],
                "tokens": [sum(piece) for piece in zip(*(shares(stream, ranks) for stream in streams))],
                "element_size": 2,
            }  # fmt: skip
            sent = map(sum, zip(exchange_heads(**sizes).sent, exchange_outputs(**sizes).sent))
            assert split["layer_bytes"] == max(sent)


def test_uneven_heads_show_in_the_seconds(record):
    (run,) = [run for run in record["runs"] if run["clip"].startswith("Wan2.1 1.3B") and run["attention"] == "dense"]
    alone, eight = run["by_gpus"][0], run["by_gpus"][-1]
    assert (run["heads"], eight["heads"]) == (12, 2)
    attention = 4 * run["layers"] * run["heads"] * run["head_dim"] * run["video_tokens"] ** 2 * run["passes"]
    of_attention = attention / run["tflops_per_second"]["dense attention"] / 1e12
    rest = alone["transformer_seconds"] - of_attention
    assert eight["transformer_seconds"] == pytest.approx(of_attention / 8 / 0.75 + rest / 8, rel=0.01)


@pytest.mark.slow
def test_the_record_is_what_the_script_finds(script, record):
    link = documented_cards()[script.CARD].link
    again = script.predict_clip(script.CLIPS[1], "preset", link)
    (run,) = [run for run in record["runs"] if run["clip"] == again["clip"] and run["attention"] == "preset"]
    assert again.keys() == run.keys()
    for name in ("density", "weights_gib", "flops", "tflops_per_second"):
        assert again[name] == pytest.approx(run[name]), name
    for now, before in zip(again["by_gpus"], run["by_gpus"], strict=True):
        assert now == pytest.approx(before)


def test_the_price_is_an_option(script, record):
    record = {**record, "assumed": {**record["assumed"], "price_of_gpu_hour": 2.0}}
    tables = script.make_tables(record)
    assert "cost at $2.00 an hour" in tables["seconds"][0]
    seconds = record["runs"][0]["by_gpus"][0]["clip_seconds"]
    assert tables["seconds"][2].endswith(f"${seconds * 2 / 3600:.3f} |")
    with pytest.raises(ValueError, match="`price` must be above 0"):
        script.main(price=0.0)
