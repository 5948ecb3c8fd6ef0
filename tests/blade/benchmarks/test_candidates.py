from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from blade_kernels.crashes import DeviceCrashError

from blade.benchmarks import candidates
from blade.benchmarks.attention import AttentionBenchmark, run_attention_benchmark
from blade.benchmarks.attention_report import tables, write_report
from blade.benchmarks.candidates import (
    Candidate,
    absent_candidates,
    candidates_for,
    recorded_packages,
    register_candidate,
)
from blade.benchmarks.layers import AttentionShape
from blade.cli.bench import main

SMALL = AttentionBenchmark(
    shapes=(AttentionShape(tokens=44, head_dim=8),),
    densities=(0.3,),
    passes=("forward", "training"),
    block_size=8,
    repeats=1,
    threads=1,
)

MODULE = """
import torch
from blade_kernels.crashes import DeviceCrashError
from blade.benchmarks.candidates import Candidate, register_candidate

def attend(q, k, v, mask):
    keep = mask.keep.repeat_interleave(mask.block_size[0], 2)[:, :, : q.shape[1]]
    keep = keep.repeat_interleave(mask.block_size[1], 3)[..., : k.shape[1]]
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=keep).transpose(1, 2)

register_candidate(Candidate(name="masked", attend=attend, sparse=True, package="numpy"))
register_candidate(Candidate(name="einsum", attend=attend, has_backward=lambda q: False))
register_candidate(Candidate(name="picky", attend=attend, sparse=True, refuses=lambda q, k, v, mask: "not today"))
register_candidate(Candidate(name="absent", attend=attend, module="no_such_module"))
"""


@pytest.fixture(autouse=True)
def no_compiling(monkeypatch):
    """FlexAttention takes seconds to compile, and is tested elsewhere."""
    monkeypatch.setattr("blade_kernels.block_sparse.flex.missing_cpp_toolchain", lambda: "this is a test")


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The module above, imported; afterwards its candidates are gone."""
    candidates.recorded_packages()  # loads what is installed
    monkeypatch.setattr(candidates, "CANDIDATES", dict(candidates.CANDIDATES))
    (tmp_path / "masked_attention.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("masked_attention")
    sys.modules.pop("masked_attention", None)


def names_for(q, block_size) -> list[str]:
    return [candidate.name for candidate in candidates_for(q, block_size)]


def test_the_table_on_the_cpu(monkeypatch):
    dense = [
        name for backend in ("flash", "efficient", "cudnn", "math") for name in (backend, f"{backend}, heads first")
    ]
    q = torch.zeros(1, 64, 2, 8)
    assert names_for(q, 64) == [*dense, "triton", "flex", "cpu"]
    monkeypatch.setattr(candidates, "MATH_BYTES", 4 * 2 * 64**2 - 1)
    assert names_for(q, 64) == [*dense[:-2], "triton", "flex", "cpu"]
    flex = next(candidate for candidate in candidates_for(q, 64) if candidate.name == "flex")
    assert flex.own and flex.sparse and not flex.has_backward(q)


def test_the_table_on_cuda(monkeypatch):
    """Where every peer is installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    half = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 64, 2, 64))
    dense = ["flash", "flash, deterministic", "efficient", "cudnn", "math"]
    several = ["flash-attn", "flash-attn 3", "flash-attn 4"]
    peers = [*several, "flashinfer", "sageattention"]
    own = ["triton", "triton, int8", "triton, fp8", "cute", "flex"]
    assert names_for(half, 128) == [*dense, *own, *peers, "SpargeAttn"]
    assert names_for(half, 64) == [*dense, *own, *peers, "fastvideo-kernel"]
    batch = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(2, 64, 2, 64))
    assert names_for(batch, 64) == [*dense, *own, *several, "sageattention"]
    single = SimpleNamespace(is_cuda=True, dtype=torch.float32, shape=(1, 64, 2, 64))
    assert names_for(single, 128) == [*dense, "triton", "flex"]
    without = {candidate.name for candidate in candidates_for(half, 128) if not candidate.has_backward(half)}
    assert without == {"triton, int8", "triton, fp8", "flashinfer", "sageattention", "SpargeAttn"}


def test_versions_of_peers_are_recorded():
    assert recorded_packages() == (
        "flash-attn", "flash-attn-3", "flash-attn-4", "flashinfer-python", "sageattention", "spas-sage-attn",
        "fastvideo-kernel",
    )  # fmt: skip


def test_why_peers_are_not_measured_is_said(monkeypatch):
    q = torch.zeros(1, 64, 2, 8)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    absent = absent_candidates(q, 64)
    assert absent["flash-attn 4"] == "`flash-attn-4` is not installed" and "triton" not in absent
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert absent_candidates(q, 64)["SpargeAttn"] == "it takes no float32 on cpu in blocks of 64, batch 1"

    def broken(name):
        raise ImportError("no driver")

    monkeypatch.setattr(importlib.util, "find_spec", broken)
    assert absent_candidates(q, 64) == absent


@pytest.mark.parametrize("returned", [lambda out: out, lambda out: (out, None)])
def test_peers_are_called_as_they_are_documented(monkeypatch, returned):
    """FlashAttention-4 takes (B, S, H, D) and may return the log-sum-exp; FlashInfer takes one sequence."""
    q, k, v = torch.randn(3, 1, 12, 2, 8)
    plain = candidates.CANDIDATES["math"].attend(q, k, v, None)
    cute = SimpleNamespace(flash_attn_func=lambda *x: returned(candidates.CANDIDATES["math"].attend(*x, None)))
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(cute=cute))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)

    def prefill(q, k, v, *, causal):
        assert q.shape == (12, 2, 8) and not causal
        return candidates.CANDIDATES["math"].attend(q[None], k[None], v[None], None)[0]

    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(single_prefill_with_kv_cache=prefill))
    for name in ("flash-attn 4", "flashinfer"):
        assert torch.equal(candidates.CANDIDATES[name].attend(q, k, v, None), plain), name


def test_a_name_is_given_once(added):
    with pytest.raises(ValueError, match=r"`name` must be new in the table, which has flash, .*, got 'flash'"):
        register_candidate(Candidate(name="flash", attend=added.attend))


def test_added_candidates_are_measured_and_reported(added, tmp_path):
    pytest.importorskip("matplotlib")
    report = run_attention_benchmark(SMALL, command="x")
    (case,) = report["cases"]
    assert case["sparse"] == ["cpu", "masked"] and case["error"]["masked"] < 1e-5
    assert set(case["ms"]["masked"]) == {"forward", "training"} and set(case["ms"]["einsum"]) == {"forward"}
    assert case["missing"]["picky"] == "not today" and "absent" not in {*case["ms"], *case["missing"]}
    assert report["versions"]["numpy"] is not None
    dense, forward, *_ = tables(report)
    assert "einsum" in [row[1] for row in dense.rows]
    assert forward.headings == ["size", "density", "dense ms", "cpu ms", "masked ms"]
    _, page, plot = write_report(report, tmp_path / "report")
    assert "masked ms" in page.read_text() and "| picky | not today |" in page.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_command_shows_added_candidates(added, capsys):
    arguments = ["--tokens", "44", "--heads", "1", "--head-dim", "8", "--block-size", "8", "--repeats", "1"]
    with pytest.raises(SystemExit) as ended:
        main(["attention", *arguments, "--passes", "forward"])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "masked" in shown and "einsum" in shown


@pytest.mark.parametrize("place", ["forward", "training"])
def test_a_crash_of_a_gpu_is_not_taken_for_a_missing_feature(monkeypatch, place):
    """Neither there nor at whatever is measured next."""
    calls = []

    def attend(q, k, v, mask):
        calls.append(q.requires_grad)
        if q.requires_grad == (place == "training"):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore lines")
        return candidates.CANDIDATES["math"].attend(q, k, v, mask)

    monkeypatch.setattr(candidates, "CANDIDATES", dict(candidates.CANDIDATES))
    register_candidate(Candidate(name="crashing", attend=attend))
    message = (
        r"`crashing`, .*density 1.0 has crashed cpu: CUDA error: an illegal memory access was encountered\. A new"
    )
    with pytest.raises(DeviceCrashError, match=message) as found:
        run_attention_benchmark(SMALL)
    assert "\n" not in str(found.value) and calls


@pytest.mark.parametrize("tried", [None, True, False])
def test_what_is_tried_ends_nothing(monkeypatch, tried):
    """Neither what it raises nor its wrong output; a card's benchmark measures it apart."""
    right = candidates.CANDIDATES["cpu"].attend

    def fail(*_):
        raise ZeroDivisionError("a compiler's own error\nmore lines")

    monkeypatch.setattr(candidates, "CANDIDATES", dict(candidates.CANDIDATES))
    flags = {"sparse": True, "own": True, "tried": True}
    register_candidate(Candidate(name="failing", attend=fail, **flags))
    register_candidate(Candidate(name="wrong", attend=lambda *given: 1.5 * right(*given), **flags))
    register_candidate(Candidate(name="right", attend=right, **flags))
    (case,) = run_attention_benchmark(replace(SMALL, tried=tried))["cases"]
    assert case["sparse"] == [*(["cpu"] if tried is not True else []), *(["right"] if tried is not False else [])]
    if tried is not False:
        assert case["missing"]["failing"] == "a compiler's own error"
        assert case["missing"]["wrong"] == "its output is wrong: relative error 0.5"
    assert {"failing", "wrong"}.isdisjoint({*case["ms"], *case["error"]})
    assert ("triton" in case["missing"]) == (tried is not True)
