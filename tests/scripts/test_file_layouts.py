"""The table of file layouts: each loads with the change that it stands for, or is refused with what to do."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers.loaders import lora_conversion_utils, single_file_utils

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    import file_layouts
    import foreign_attention
    import layout_models
    import layout_rows
    import layout_writers
finally:
    sys.path.remove(str(SCRIPTS))

REFUSED = {
    "LoKr": r"blocks\.0\.self_attn\.q \(lokr_w1 is of no LoRA\)\. Take a LoRA that was trained from this model",
    "lightx2v, one of two experts": r"nothing in transformer_2\. Give a file for each transformer: `FIRST:SECOND`",
    "FastWan, gates of VSA": r"2 of its modules, .* blocks\.0\.to_gate_compress \(.*second softmax.*; take weights",
    "TurboWan, as it is published (.pth)": r"must be a \.safetensors file, .* a pickle, .*save_file`, and give that",
    "TurboWan, made safetensors, projections of SLA": r"blocks\.0\.self_attn\.attn_op\.local_attn\.proj_l \(the proj.*"
    r"linear branch; take a LoRA or weights",
    "whole weights as a LoRA": r"whole weights and no LoRA, such as blocks\.0\.\S+: give it as `student`",
    "FastH3 LoRA, gates of VSA with tiles of 64 tokens": r"transformer_blocks\.0\.attn\.to_gate_compress \(.*; take",
}
"""Layouts that are refused, with the module and the remedy; all others load."""


pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft", "ignore:Adapter .* was active which is now")


@pytest.mark.parametrize("row", layout_rows.ROWS, ids=lambda row: row.name)
def test_each_layout_does_what_the_table_says(row: layout_rows.Layout, tmp_path: Path) -> None:
    result = file_layouts.load(row, tmp_path)
    if row.name in REFUSED:
        assert result.refusal is not None and re.search(REFUSED[row.name], result.refusal), result.refusal
        return
    assert result.refusal is None and result.modules is not None and result.untouched
    assert result.difference < 1e-6 < 0.5 < result.change


def test_the_table_in_the_documents_is_of_these_layouts() -> None:
    written = json.loads((ROOT / "docs" / "results" / "file-layouts" / "layouts.json").read_text(encoding="utf-8"))
    rows = written["layouts"]
    assert [row["layout"] for row in rows] == [row.name for row in layout_rows.ROWS] and len(rows) >= 20
    assert {row["layout"] for row in rows if row["refusal"] is not None} == set(REFUSED)
    assert all(row["difference"] < 1e-6 for row in rows if row["refusal"] is None)
    assert f"has {len(rows)} layouts" in (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    measured = foreign_attention.branch_differences()
    assert set(written["branches"]) == set(measured)
    assert all(written["branches"][name] == pytest.approx(value, abs=1e-6) for name, value in measured.items())


def test_the_attention_of_other_students_is_not_blades_but_where_its_branch_is_zero() -> None:
    """The means of dropped blocks share a softmax with the kept ones; those of VSA have one of their own."""
    for name, difference in foreign_attention.branch_differences().items():
        assert difference < 1e-12 if re.search(r"(gate|projection) 0,", name) else difference > 0.1, name


def diffusers_version(file: layout_models.FileOf, convert) -> dict[str, torch.Tensor]:
    return convert({key: tensor.clone() for key, tensor in file.tensors.items()})


@pytest.mark.parametrize(
    ("pipe", "convert"),
    [
        (layout_models.wan, single_file_utils.convert_wan_transformer_to_diffusers),
        (layout_models.ltx_video, single_file_utils.convert_ltx_transformer_checkpoint_to_diffusers),
    ],
)
def test_whole_weights_by_the_authors_names_are_those_that_diffusers_converts(pipe, convert) -> None:
    file = layout_writers.whole_original(pipe().transformer)
    converted = diffusers_version(file, convert)
    assert set(converted) == set(file.expected)
    assert all(torch.equal(converted[name], weight) for name, weight in file.expected.items())


@pytest.mark.parametrize(
    ("pipe", "write", "convert"),
    [
        (
            layout_models.minimax_h3,
            layout_writers.h3("diffusion_model.", alpha=4.0, endings=layout_models.DOWN_UP),
            lora_conversion_utils._convert_non_diffusers_minimax_h3_lora_to_diffusers,
        ),
        (
            layout_models.ltx_2,
            layout_writers.pairs(layout_writers.LTX_2, "diffusion_model."),
            lora_conversion_utils._convert_non_diffusers_ltx2_lora_to_diffusers,
        ),
    ],
    ids=["minimax-h3", "ltx-2"],
)
def test_the_changes_are_those_that_diffusers_converts(pipe, write, convert) -> None:
    """The names and orders of rows that the table writes are Diffusers' too."""
    transformer = pipe().transformer
    file = write(transformer)
    converted = diffusers_version(file, convert)
    changed = {name for name, weight in transformer.named_parameters() if not torch.equal(weight, file.expected[name])}
    assert {f"transformer.{name.removesuffix('.weight')}.lora_A.weight" for name in changed} == {
        key for key in converted if key.endswith("lora_A.weight")
    }
    for name in changed:
        begin = f"transformer.{name.removesuffix('.weight')}"
        product = converted[f"{begin}.lora_B.weight"] @ converted[f"{begin}.lora_A.weight"]
        torch.testing.assert_close(transformer.get_parameter(name) + product, file.expected[name])


@pytest.mark.slow
def test_the_script_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file_layouts.main(tmp_path)
    assert "| lightx2v, Wan2.1 distill LoRA |" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "layouts.json").read_text())["layouts"]) == len(layout_rows.ROWS)
