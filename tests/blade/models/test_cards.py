"""Speeds of cards: documented peaks by name, and what the times of a report amount to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from card_reports import attention_step, make_report

from blade.models.cards import RATES, CardReport, DocumentedCard, documented_cards, find_card

F32, BF16 = torch.float32, torch.bfloat16


def test_every_documented_card_has_its_source() -> None:
    cards = documented_cards()
    assert {"A100", "H100", "H200", "B200", "L40S", "RTX 4090", "RTX 5090"} <= set(cards)
    for name, card in cards.items():
        assert card.source.startswith("https://"), name
        assert card.half == pytest.approx(2 * card.tf32, rel=0.03), name  # as on every one of them
        assert card.link.source.startswith("https://") and card.link.gb_per_second > 0, name
    assert (cards["H200"].link.name, cards["H200"].link.gb_per_second) == ("NVLink 4", 450)
    assert {name for name, card in cards.items() if "PCIe" in card.link.name} == {"L40S", "RTX 4090", "RTX 5090"}


def test_the_link_of_a_report_is_that_of_the_card_of_its_name() -> None:
    report = make_report()
    assert CardReport("x", report).link is None
    report["machine"]["device"] = "NVIDIA GeForce RTX 4090"
    assert CardReport("x", report).link == documented_cards()["RTX 4090"].link


@pytest.mark.parametrize(
    ("text", "name"),
    [("H200", "H200"), ("nvidia-h200", "H200"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("rtx4090", "RTX 4090")],
)
def test_a_card_is_found_by_its_name(text: str, name: str) -> None:
    card = find_card(text)
    assert isinstance(card, DocumentedCard) and card.name == name and card.default_dtype == "bfloat16"


def test_an_unknown_card_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`card` must be one of A100, H100, .*, got 'h201'; did you mean H200\?"):
        find_card("h201")
    with pytest.raises(ValueError, match=r"or the JSON of a blade-bench gpu on another, got 'Voodoo 2'\."):
        find_card("Voodoo 2")
    with pytest.raises(ValueError, match=r"there is no file nothing\.json"):
        find_card("nothing.json")
    with pytest.raises(ValueError, match="there is no file"):
        find_card(str(tmp_path))


def test_the_decoder_has_a_dtype_of_its_own() -> None:
    rates = documented_cards()["A100"].rates(BF16, F32, 100, 0.5)
    assert {name: rate.tflops for name, rate in rates.rates.items()} == {**dict.fromkeys(RATES, 312.0), "decoder": 156}
    assert not rates.measured and rates.rates["decoder"].of == "TF32"
    assert documented_cards()["A100"].rates(F32, torch.float16, 100, 0.5).rates["decoder"].tflops == 312


def test_rates_follow_from_the_times(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_text(json.dumps(make_report()))
    report = find_card(str(path))
    assert isinstance(report, CardReport) and (report.name, report.default_dtype) == ("a card", "float32")
    found = report.rates(F32, F32, 200, 0.3)
    flops = 4 * 2 * 16 * 192**2
    expected = {
        "linear layers": 1.0,
        "decoder": 0.5,
        "dense attention": flops / 2e-3 / 1e12,
        "sparse attention": 0.2 * flops / 1e-3 / 1e12,  # density 0.2 is nearer, with the choice of blocks
    }
    assert {name: rate.tflops for name, rate in found.rates.items()} == pytest.approx(expected)
    assert found.measured and found.source == str(path)
    denser = report.rates(F32, F32, 200, 0.4).rates["sparse attention"]
    assert denser.tflops == pytest.approx(0.5 * flops / 4e-3 / 1e12) and "density 0.5" in denser.of
    longer = report.rates(F32, F32, 2000, 0.4).rates["dense attention"]
    assert longer.tflops == pytest.approx(4 * 2 * 16 * 3000**2 / 50e-3 / 1e12)


def test_what_was_not_measured_is_not_made_up() -> None:
    report = make_report()
    assert set(CardReport("x", report).rates(F32, F32, 100_000, 0.3).rates) == {"linear layers", "decoder"}
    assert "decoder" not in CardReport("x", report).rates(F32, torch.float16, 200, 0.3).rates
    report["steps"] = [step for step in report["steps"] if step["part"] != "generation"]
    assert set(CardReport("x", report).rates(F32, F32, 200, 0.3).rates) == {"dense attention", "sparse attention"}
    report["steps"] = [attention_step(192, 0.2, 2.0, 1.0)]
    del report["steps"][0]["result"]["cases"][0]["ms"]["cpu"]
    assert set(CardReport("x", report).rates(F32, F32, 200, 0.3).rates) == {"dense attention"}


def case_of(report: dict) -> dict:
    return report["steps"][2]["result"]["cases"][0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda report: report.pop("machine"), "must be the JSON of a blade-bench gpu; it lacks 'machine'"),
        (lambda report: report.update(steps=[]), "must have timed attention or videos in one dtype, got nothing"),
        (lambda report: report.update(steps=3), "must be the JSON of a blade-bench gpu"),
        (lambda report: case_of(report).update(tokens=0), "`tokens` of `card` must be"),
        (lambda report: case_of(report).update(density=2), r"`density` of `card` must be in \(0, 1\]"),
        (lambda report: case_of(report).pop("heads"), "lacks 'heads'"),
        (lambda report: case_of(report)["ms"]["fast"].update(forward=-1), "must hold milliseconds above 0 of 2 heads"),
        (lambda report: case_of(report)["ms"]["cpu"].update(whole=None), "must hold milliseconds above 0 of 2 heads"),
        (
            lambda report: report["steps"][-1]["result"]["settings"].update(model="me/mine"),
            "`model` of `card` must be",
        ),
        (lambda report: report["steps"][-1]["result"].update(parts_ms=[]), "must be the JSON of a blade-bench gpu"),
    ],
)
def test_a_broken_report_is_named(spoil, message: str) -> None:
    report = make_report()
    spoil(report)
    with pytest.raises(ValueError, match=message):
        CardReport("x", report).rates(F32, F32, 200, 0.2)


def test_a_report_is_of_one_dtype() -> None:
    with pytest.raises(ValueError, match=r"`dtype` must be float32, which `card` x measured in, got 'bfloat16'"):
        CardReport("x", make_report()).rates(BF16, F32, 200, 0.3)
