import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from blade_kernels import toolchain
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import flex
from blade_kernels.block_sparse.api import block_sparse_attention

CPU = ("cpu", torch.float32, 64, (64, 64), False, False)


@pytest.fixture
def compiles():
    problem = flex.unsupported(*CPU)
    if problem:
        pytest.skip(problem)


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "pooled", "lengths"), [(300, None, False), (129, "dropped", True)])
def test_errs_no_more_than_the_plain_computation(compiles, dense, as_good_as, case, tokens, pooled, lengths):
    inputs = case(tokens, size=24, block_size=(32, 16), pooled=pooled, lengths=lengths, dtype=torch.float32)
    arguments = {"pooled": inputs.pooled(), "key_lengths": inputs.key_lengths}
    if lengths:
        for item, length in enumerate(inputs.key_lengths):
            inputs.k[item, length:] = inputs.v[item, length:] = float("nan")
    tensors = (inputs.q, inputs.k, inputs.v, inputs.mask)
    found = block_sparse_attention(*tensors, **arguments, implementation="flex")
    assert found.is_contiguous()
    if pooled is None:
        assert not found[0, :32, 0].any()  # a row that keeps nothing
    as_good_as(found, dense(*tensors, **arguments)[0], dense(*tensors, **arguments, dtype=torch.float32)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: "mps"}, "not used on mps"),
        ({1: torch.float64}, "not torch.float64"),
        ({4: True}, "no backward on the CPU"),
        ({5: True}, "no log-sum-exp on the CPU"),
        ({0: "cuda", 2: 8}, "heads of at least 16, got 8"),
        ({0: "cuda", 3: (64, 24)}, r"a multiple of 16 tokens, got \(64, 24\)"),
        ({0: "cuda", 4: True}, r"backward needs blocks of a multiple of 128 tokens, got \(64, 64\)"),
    ],
)
def test_says_what_it_can_not_do(change, message):
    arguments = [change.get(index, value) for index, value in enumerate(CPU)]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(flex.unsupported(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [8, 16, 24])
def test_a_block_may_have_eight_keys_more_than_a_multiple_of_sixteen(head_size):
    problem = flex.unsupported("cpu", torch.float32, head_size, (24, 24), False, False)
    if problem:
        pytest.skip(problem)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 99, 2, head_size)
    mask = BlockMask.from_dense(torch.rand(1, 2, 5, 5) < 0.5, (24, 24))
    found = block_sparse_attention(q, k, v, mask, implementation="flex")
    torch.testing.assert_close(found, block_sparse_attention(q, k, v, mask, implementation="naive"))


def test_heads_that_overrun_a_buffer_on_avx2_are_refused(compiles, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    sizes = (8, 16, 24, 32, 64, 128)
    problems = [flex.unsupported("cpu", torch.float32, size, (64, 64), False, False) for size in sizes]
    assert [size for size, problem in zip(sizes, problems) if problem] == [8, 16]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert not flex.unsupported("cpu", torch.float32, 16, (64, 64), False, False)


@pytest.mark.slow
def test_code_compiled_for_other_vector_instructions_is_not_used(compiles, tmp_path):
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("only AVX512 machines run code of two kinds")
    code = """
import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import block_sparse_attention
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 64, 2, 64)
mask = BlockMask.from_dense(torch.rand(1, 2, 8, 8) < 0.5, (8, 8))
results = (block_sparse_attention(q, k, v, mask, implementation=name) for name in ("flex", "naive"))
torch.testing.assert_close(*results)
print(torch.backends.cpu.get_cpu_capability())
"""
    for capability in ("avx2", "avx512"):
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": capability}
        command = [sys.executable, "-c", code]
        shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert shown.stdout.strip() == capability.upper()


@pytest.mark.slow
def test_without_a_compiler_everything_but_flex_works():
    code = """
import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import block_sparse_attention, flex
q = torch.randn(1, 128, 1, 32)
mask = BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool))
print(block_sparse_attention(q, q, q, mask).shape)
print(flex.unsupported("cuda", torch.float32, 32, (64, 64), False, False))
try:
    block_sparse_attention(q, q, q, mask, implementation="flex")
except NotImplementedError as error:
    print(error)
"""
    environment = os.environ | {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    lines = shown.stdout.splitlines()
    assert lines[0] == "torch.Size([1, 128, 1, 32])"
    assert lines[1] == "Triton's launcher has to be compiled, and the compiler '/nowhere/cc' is not there"
    assert "the compiler '/nowhere/c++' is not there" in lines[2]


def test_a_compiler_that_fails_is_told_by_its_first_words(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    assert toolchain._build_failure(str(compiler), "module.cpp") == f"the compiler '{compiler}' fails: no such header"
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda _: str(tmp_path))
    assert toolchain._build_failure(str(compiler), "module.cpp") == f"Python.h is not in {tmp_path}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("block_size", [(64, 64), (128, 128)])
@pytest.mark.parametrize("pooled", [None, "all", "dropped"])
def test_on_cuda_with_gradients_and_log_sum_exp(dense, as_good_as, case, block_size, pooled):
    inputs = case(1000, size=64, block_size=block_size, pooled=pooled, lengths=True, dtype=torch.bfloat16)
    pooled = inputs.pooled()
    grad = block_size == (128, 128)
    exact, exact_lse = dense(inputs.q, inputs.k, inputs.v, inputs.mask, pooled=pooled, key_lengths=inputs.key_lengths)
    plain, plain_lse = dense(
        inputs.q, inputs.k, inputs.v, inputs.mask, pooled=pooled, key_lengths=inputs.key_lengths, dtype=torch.bfloat16
    )
    tensors = [x.cuda().requires_grad_(grad) for x in (inputs.q, inputs.k, inputs.v)]
    if pooled is not None:
        moved = [x if x is None else x.cuda() for x in (pooled.k, pooled.v, pooled.log_weight, pooled.key_block)]
        pooled = type(pooled)(*moved)
    out, lse = block_sparse_attention(
        *tensors,
        inputs.mask.to("cuda"),
        pooled=pooled,
        key_lengths=inputs.key_lengths.cuda(),
        return_lse=True,
        implementation="flex",
    )
    as_good_as(out.cpu(), exact, plain)
    as_good_as(lse.cpu(), exact_lse, plain_lse)
    if grad:
        assert all(x.isfinite().all() for x in torch.autograd.grad(out.float().square().sum(), tensors))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_rows_read_their_own_lists(dense, as_good_as):
    """With as many blocks as make the compiler pad strides of lists, all of them in the lists, and two items."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, 2, 37 * 128 - 50, 3, 64, generator=generator, dtype=torch.bfloat16).unbind()
    keep = torch.rand(2, 3, 37, 37, generator=generator) < 0.3
    keep[..., 0] = True
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        tensors = [x.to("cuda", dtype).requires_grad_() for x in (q, k, v)]
        mask = BlockMask.from_dense(keep.cuda(), (128, 128))
        out = dense(*tensors, mask, dtype=dtype)[0]
        results.append([out, *torch.autograd.grad(out, tensors, grad.to("cuda", dtype))])
    tensors = [x.cuda().requires_grad_() for x in (q, k, v)]
    out = block_sparse_attention(*tensors, mask, implementation="flex")
    found = [out, *torch.autograd.grad(out, tensors, grad.cuda())]
    for one, exact, plain in zip(found, *results, strict=True):
        as_good_as(one, exact, plain)


def test_on_a_gpu_it_needs_triton(monkeypatch):
    """Also where no compiler is missing, as on Windows, where Triton's package brings one."""
    monkeypatch.setattr(flex, "missing_c_toolchain", lambda: None)
    assert flex._unsupported_on_cuda(64, (128, 128), needs_grad=False) is None
    monkeypatch.setattr(flex, "triton_installed", lambda: False)
    assert "is not installed" in flex._unsupported_on_cuda(64, (128, 128), needs_grad=False)


def test_on_windows_triton_brings_its_compiler_unless_another_is_named(monkeypatch):
    monkeypatch.setattr(toolchain, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.delenv("CC", raising=False)
    assert toolchain.missing_c_toolchain.__wrapped__() is None
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "'no-such-compiler' is not there" in toolchain.missing_c_toolchain.__wrapped__()
    monkeypatch.delenv("CXX", raising=False)
    assert "'cl' is not there" in toolchain.missing_cpp_toolchain.__wrapped__()
