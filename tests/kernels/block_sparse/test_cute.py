"""The adapter of the CuTe kernels, with plain PyTorch in their place that keeps their contracts."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import api, block_sparse_attention, cute, cute_table, triton_attention
from cute_stand_ins import StandInCudnn, StandInFlash

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for the CPU"),
    needs_triton,  # adds the pooled tokens, and computes what the table does not hold
]


@pytest.fixture
def card(monkeypatch):
    """Pretend that the CPU is a card with both libraries, and that their kernels take float32 too."""

    def pretend(architecture, libraries=("cudnn", "flash")):
        stand_ins = {"cudnn": StandInCudnn(architecture), "flash": StandInFlash()}
        rows = tuple(replace(row, dtypes=(*row.dtypes, torch.float32)) for row in cute_table.ROWS)
        monkeypatch.setattr(cute_table, "ROWS", rows)
        monkeypatch.setattr(cute, "architecture", lambda device_type: architecture)
        monkeypatch.setattr(cute, "missing_library", lambda name: None if name in libraries else "not installed")
        monkeypatch.setattr(cute, "library", stand_ins.__getitem__)
        return stand_ins

    return pretend


def results(function, inputs, seed=0, through_lse=False):
    """Output, log-sum-exp, and the gradients of q, k and v."""
    out, lse = function()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss = (out.double() * weight).sum()
    if through_lse:
        loss = loss + lse[lse.isfinite()].double().sin().sum()
    return [out, lse, *torch.autograd.grad(loss, (inputs.q, inputs.k, inputs.v))]


def attend(inputs, **options):
    return block_sparse_attention(
        inputs.q, inputs.k, inputs.v, inputs.mask,
        pooled=inputs.pooled(), key_lengths=inputs.key_lengths, return_lse=True,
        implementation="cute", **options,
    )  # fmt: skip


def check(dense, inputs, **options):
    """Everything is within 1e-3 of dense attention in float64."""
    precise = results(
        lambda: dense(
            inputs.q, inputs.k, inputs.v, inputs.mask, pooled=inputs.pooled(), key_lengths=inputs.key_lengths
        ),
        inputs,
        **options,
    )
    for found, exact in zip(results(lambda: attend(inputs), inputs, **options), precise, strict=True):
        assert found.dtype == torch.float32 and found.is_contiguous()
        torch.testing.assert_close(found.double(), exact.double(), atol=1e-3, rtol=1e-3)


ODD = {
    # architecture, block size of the mask, and tokens that fill no block
    "cudnn, sm_90, 128": (90, (128, 128), 300, "cudnn"),
    "cudnn, sm_90, 64": (90, (64, 64), 150, "cudnn"),
    "cudnn, sm_100, 128": (100, (128, 128), 300, "cudnn"),
    "cudnn, sm_100, 64": (100, (64, 64), 150, "cudnn"),
    "cudnn, sm_120, 128": (120, (128, 128), 300, "cudnn"),
    "cudnn, sm_120, 64": (120, (64, 64), 150, "cudnn"),
    "flash, sm_90, 128": (90, (128, 128), 300, "flash"),
    "flash, sm_90, 128 by 64": (90, (128, 64), 300, "flash"),
    "flash, sm_90, 64 by 128": (90, (64, 128), 300, "flash"),
    "flash, sm_100, 256 by 128": (100, (256, 128), 600, "flash"),
}


@pytest.mark.parametrize(
    "pooled", [None, *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("all", "dropped"))]
)
@pytest.mark.parametrize("kind", ODD)
def test_computes_what_dense_attention_computes(dense, case, card, kind, pooled):
    architecture, block_size, tokens, library = ODD[kind]
    stand_ins = card(architecture, (library,))
    inputs = case(
        tokens, keys=tokens + 77, heads=2, size=128, block_size=block_size, density=0.5, pooled=pooled,
        dtype=torch.float32, grad=True,
    )  # fmt: skip
    check(dense, inputs)
    forward, *backward = stand_ins[library].calls
    assert not forward.backward
    lacks_backward = architecture == 120 or block_size == (128, 64)
    assert len(backward) == (0 if lacks_backward else 1) and all(call.backward for call in backward)


@pytest.mark.parametrize("architecture", [90, 100, 120])
@pytest.mark.parametrize("pooled", [None, "dropped"])
def test_key_lengths(dense, case, card, architecture, pooled):
    stand_ins = card(architecture)
    inputs = case(
        200, keys=330, size=128, block_size=(64, 64), pooled=pooled, lengths=True, dtype=torch.float32, grad=True
    )
    if pooled is None:  # what lies behind the valid keys is never looked at
        with torch.no_grad():
            for item, length in enumerate(inputs.key_lengths):
                inputs.k[item, length:] = inputs.v[item, length:] = float("nan")
        exact = case(200, keys=330, size=128, block_size=(64, 64), lengths=True, grad=True, dtype=torch.float32)
        expected = results(lambda: dense(exact.q, exact.k, exact.v, exact.mask, key_lengths=exact.key_lengths), exact)
        for found, precise in zip(results(lambda: attend(inputs), inputs), expected, strict=True):
            torch.testing.assert_close(found.double(), precise.double(), atol=1e-3, rtol=1e-3)
    else:
        check(dense, inputs)
    assert not stand_ins["flash"].calls
    # one call for the batch, or one for each item where a kernel takes one number of valid keys
    assert {call.batch for call in stand_ins["cudnn"].calls} == {1 if architecture == 100 else 2}


def test_items_without_keys_and_masks_that_are_shared(dense, case, card):
    card(90)
    inputs = case(
        130, size=64, block_size=(128, 128), shared=(True, True), density=1.1, lengths=True, dtype=torch.float32,
        grad=True,
    )  # fmt: skip
    inputs.key_lengths[1] = 0
    check(dense, inputs)
    out, lse = attend(inputs)
    assert not out[1].any() and (lse[1] == -torch.inf).all()


@pytest.mark.parametrize("pooled", [None, "all"])
def test_blocks_are_divided_where_no_kernel_has_them(dense, case, card, pooled):
    stand_ins = card(100)
    inputs = case(
        300, keys=200, size=128, block_size=(128, 64), pooled=pooled, dtype=torch.float32, grad=True, density=0.6
    )
    check(dense, inputs)
    assert [call.block for call in stand_ins["cudnn"].calls] == [64, 64]


def test_a_gradient_of_the_log_sum_exp_and_determinism_are_left_to_triton(dense, case, card, monkeypatch):
    stand_ins = card(90)
    inputs = case(200, size=128, block_size=(128, 128), pooled="all", dtype=torch.float32, grad=True)
    check(dense, inputs, through_lse=True)
    assert [call.backward for call in stand_ins["cudnn"].calls] == [False]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    check(dense, inputs)
    assert [call.backward for call in stand_ins["cudnn"].calls] == [False, False]


def test_half_precision_and_a_negative_scale(dense, case, card, as_good_as):
    card(90)
    inputs = case(300, size=64, block_size=(128, 128), pooled="dropped", dtype=torch.bfloat16)
    out, lse = attend(inputs, scale=-0.2)
    exact, plain = (
        dense(inputs.q, inputs.k, inputs.v, inputs.mask, pooled=inputs.pooled(), scale=-0.2, dtype=dtype)
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    as_good_as(out, exact[0], plain[0])
    as_good_as(lse, exact[1], plain[1])


def test_strided_and_unaligned_inputs(dense, case, card):
    card(90)
    inputs = case(140, size=64, block_size=(128, 128), dtype=torch.float32)
    packed = torch.zeros(2, 140, 3, 2, 65)
    q, k, v = (packed[:, :, i, :, 1:] for i in range(3))
    for x, values in zip((q, k, v), (inputs.q, inputs.k, inputs.v)):
        x.copy_(values)
    out = block_sparse_attention(q, k, v, inputs.mask, implementation="cute")
    exact, _ = dense(inputs.q, inputs.k, inputs.v, inputs.mask)
    torch.testing.assert_close(out.double(), exact, atol=1e-4, rtol=1e-4)


def test_auto_takes_only_what_a_card_has_verified(case, card, monkeypatch):
    card(90)
    inputs = case(128, size=128, block_size=(128, 128), dtype=torch.float32, grad=True)
    facts = api._Call("cuda", torch.float32, 128, (128, 128), True, True, False, False, "full")
    forward, backward = "cudnn forward sm_90 128 128x128", "cudnn backward sm_90 128 128x128"
    for found, expected in ((set(), False), ({forward}, False), ({backward}, False), ({forward, backward}, True)):
        monkeypatch.setattr(cute, "verified", lambda found=found: frozenset(found))
        assert facts.is_for_cute() is expected
    monkeypatch.setattr(cute, "verified", lambda: frozenset({forward}))
    assert facts._replace(needs_grad=False).is_for_cute()
    assert not facts._replace(precision="int8").is_for_cute()
    assert not facts._replace(needs_grad=False, block_size=(64, 64)).is_for_cute()
    assert api._resolve("auto", *facts._replace(needs_grad=False)) == "cute"
    assert inputs.q.requires_grad


def test_one_library_alone_can_be_asked_for(case, card):
    stand_ins = card(90)
    inputs = case(128, size=128, block_size=(128, 128), dtype=torch.float32)
    attend(inputs)
    with cute.only_library("flash"):
        attend(inputs)
    assert [len(stand_ins[name].calls) for name in ("cudnn", "flash")] == [1, 1]


@pytest.mark.parametrize(
    ("architecture", "options", "says"),
    [
        (None, {}, "run on NVIDIA GPUs, not on cpu"),
        (80, {}, "need compute capability 9.0, 10.0, 10.3, 12.0, got 8.0"),
        (90, {"size": 32}, "no CuTe kernel of sm_90 computes torch.float32 with heads of 32"),
        (90, {"block_size": (32, 32)}, "blocks of 32 queries by 32 keys"),
        (120, {"size": 64}, "no CuTe kernel of sm_120"),
        (90, {"precision": "int8"}, "in full precision, not 'int8'"),
    ],
)
def test_what_cannot_be_computed_is_refused(case, card, architecture, options, says):
    card(architecture)
    precision = options.pop("precision", "full")
    inputs = case(130, **{"size": 128, "block_size": (128, 128), "dtype": torch.float32} | options)
    with pytest.raises(NotImplementedError, match="cannot compute this") as error:
        attend(inputs, precision=precision)
    assert says in str(error.value)


def test_what_is_not_installed_is_named(case, card):
    card(90, libraries=())
    with pytest.raises(NotImplementedError, match="not installed"):
        attend(case(130, size=128, block_size=(128, 128), dtype=torch.float32))


def test_divided_masks_say_the_same(case):
    mask = case(300, keys=310, block_size=(128, 64), density=0.5).mask
    divided = cute._divided(mask, (64, 32), 300, 310)
    divided.check_values()
    tokens = [
        m.keep.repeat_interleave(m.block_size[0], 2)[:, :, :300].repeat_interleave(m.block_size[1], 3)[..., :310]
        for m in (mask, divided)
    ]
    assert torch.equal(*tokens)
    shortened = cute._shortened(divided, torch.tensor([3, 0]))
    shortened.check_values()
    assert not shortened.keep[1].any() and not shortened.keep[0, ..., 3:].any() and shortened.keep[0].any()


def test_compiled_graphs_hold_the_operator(case, card):
    card(90)
    inputs = case(130, size=128, block_size=(128, 128), dtype=torch.float32)

    def attend_to(q, k, v, keep):
        mask = BlockMask.from_dense(keep, (128, 128))
        return block_sparse_attention(q, k, v, mask, implementation="cute")

    expected = attend_to(inputs.q, inputs.k, inputs.v, inputs.mask.keep)
    compiled = torch.compile(attend_to, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs.q, inputs.k, inputs.v, inputs.mask.keep), expected)


def test_every_row_has_its_backward_on_triton_or_in_the_table():
    for architecture in {number for row in cute_table.ROWS for number in row.architectures}:
        for kernel in cute_table.kernels_of(architecture):
            blocks, dtype = cute._triton_blocks(kernel.block_size), kernel.row.dtypes[0]
            assert triton_attention.unsupported("cpu", dtype, kernel.head_size, blocks) is None
