"""Fused normalisation and rotary embedding: Diffusers' own operations, the specification, and what is fast."""

import importlib.util

import pytest
import torch
from blade_kernels.qk_norm_rope import NORMS, qk_norm_rope
from diffusers.models.embeddings import apply_rotary_emb

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
IMPLEMENTATIONS = ["naive", "cpu", pytest.param("triton", marks=needs_triton)]


def make(norm, tokens=7, heads=3, size=16, *, batch=2, rope=True, start=2, places=None, dtype=torch.float32, seed=0):
    """Queries and options of `qk_norm_rope`, with gradients where there can be any."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, heads, size, generator=generator).to(dtype).requires_grad_()
    options = {"norm": norm, "eps": 1e-5}
    width = heads * size if norm == "rms-all-heads" else size
    if norm != "none":
        options["weight"] = torch.randn(width, generator=generator).requires_grad_()
    if norm == "layer":
        options["bias"] = torch.randn(width, generator=generator).requires_grad_()
    if rope:
        angles = (torch.rand(tokens - start, size // 2, generator=generator) * 6).repeat_interleave(2, -1)
        options |= {"cos": angles.cos(), "sin": angles.sin(), "rope_start": start}
    if places is not None:
        shape = (1 if places == "shared" else heads, tokens)
        options["places"] = torch.rand(shape, generator=generator).argsort(-1)
    return x, options


def run(x, options, implementation):
    """Output and the gradients of what takes them, on the CPU."""
    moved = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    out = qk_norm_rope(x.to(DEVICE), **moved, implementation=implementation)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    leaves = [x, *(options[name] for name in ("weight", "bias") if name in options)]
    return [out.cpu(), *torch.autograd.grad((out.float() * weight).sum(), leaves)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_wan_as_diffusers_computes_it(implementation):
    x, options = make("rms-all-heads", start=0)
    norm = torch.nn.RMSNorm(48, eps=1e-5)
    norm.weight.data = options["weight"].detach()
    expected = apply_rotary_emb(
        norm(x.flatten(2)).unflatten(2, (3, -1)), (options["cos"], options["sin"]), sequence_dim=1
    )
    torch.testing.assert_close(run(x, options, implementation)[0].cpu(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_cogvideox_and_hunyuan_video_as_diffusers_computes_them(implementation, norm):
    x, options = make(norm)
    module = torch.nn.LayerNorm(16, eps=1e-5) if norm == "layer" else torch.nn.RMSNorm(16, eps=1e-5)
    module.weight.data = options["weight"].detach()
    if norm == "layer":
        module.bias.data = options["bias"].detach()
    expected = module(x)
    video = apply_rotary_emb(expected[:, 2:], (options["cos"], options["sin"]), sequence_dim=1)
    expected = torch.cat((expected[:, :2], video), 1)
    torch.testing.assert_close(run(x, options, implementation)[0].cpu(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["naive", "cpu"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("places", [None, "shared", "by head"])
def test_gradients_and_places_in_plain_pytorch(implementation, norm, places):
    x, options = make(norm, tokens=4, heads=2, size=4, batch=1, places=places)
    leaves = [x, *(options[name] for name in ("weight", "bias") if name in options)]
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    names = [name for name in ("weight", "bias") if name in options]

    def function(first, *rest):
        return qk_norm_rope(first, **{**options, **dict(zip(names, rest))}, implementation=implementation)

    assert torch.autograd.gradcheck(function, leaves)
    if places is not None:
        moved = function(*leaves)
        options.pop("places"), options.update(places=None)
        still = function(*leaves)
        order = make(norm, tokens=4, heads=2, size=4, batch=1, places=places)[1]["places"].expand(2, -1)
        for head in range(2):
            for token in range(4):
                assert torch.equal(moved[0, order[head, token], head], still[0, token, head])


def run_in_float64(x, options, implementation):
    """Output and gradients, with every number in float64, on the CPU."""
    double = {
        name: v.detach().double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for name, v in options.items()
    }
    leaves = [double[name].requires_grad_() for name in ("weight", "bias") if name in double]
    wide = x.detach().double().requires_grad_()
    out = qk_norm_rope(wide, **double, implementation=implementation)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    return [out, *torch.autograd.grad((out * weight).sum(), [wide, *leaves])]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("places", [None, "shared", "by head"])
@pytest.mark.parametrize(("tokens", "heads", "rope"), [(1, 1, False), (7, 3, True), (65, 12, True)])
def test_cpu_computes_what_is_specified(norm, places, tokens, heads, rope):
    x, options = make(norm, tokens, heads, 64, places=places, rope=rope)
    for found, exact in zip(run_in_float64(x, options, "cpu"), run_in_float64(x, options, "naive")):
        torch.testing.assert_close(found, exact)


@needs_triton
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("places", [None, "shared", "by head"])
@pytest.mark.parametrize(("tokens", "heads", "rope"), [(1, 1, False), (7, 3, True), (65, 12, True)])
def test_the_kernel_errs_no_more_than_the_plain_computation(
    as_good_as, norm, places, tokens, heads, rope, monkeypatch
):
    monkeypatch.setattr("blade_kernels.qk_norm_rope.operator._BACKWARD_PROGRAMS", 5)
    x, options = make(norm, tokens, heads, 64, places=places, rope=rope)
    found, plain = run(x, options, "triton"), run(x, options, "cpu")
    exact = run_in_float64(x, options, "naive")
    for one, precise, coarse in zip(found, exact, plain):
        as_good_as(one.cpu(), precise, coarse.cpu(), factor=3.0)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(as_good_as, dtype):
    x, options = make("rms-all-heads", 9, 5, 64, dtype=dtype)
    found, plain = run(x, options, "triton"), run(x, options, "cpu")
    exact = run(x.detach().float().requires_grad_(), options, "naive")
    assert found[0].dtype == dtype and found[1].dtype == dtype
    if dtype == torch.float16 or DEVICE == "cuda":  # the interpreter cuts bfloat16 off, and does not round
        assert (found[0].cpu() != exact[0].to(dtype)).float().mean() < 0.01  # the nearest number, but for ties
    for one, precise, coarse in zip(found, exact, plain):
        as_good_as(one.cpu(), precise, coarse.cpu(), factor=2.0 if dtype == torch.float16 or DEVICE == "cuda" else 3.0)


@needs_triton
def test_views_are_read_by_their_strides_and_the_operator_is_registered_soundly():
    x, options = make("rms", 9, 3, 16, places="by head")
    wide = torch.randn(2, 9, 3, 48, device=DEVICE)
    wide[..., 16:32] = x.detach()
    view = wide[..., 16:32].requires_grad_()
    assert not view.is_contiguous()
    for one, other in zip(run(x, options, "triton"), run(view, options, "triton")):
        assert torch.equal(one.cpu(), other.cpu())
    arguments = (x, options["weight"], None, options["cos"], options["sin"], options["places"], "rms", 1e-5, 2)
    arguments = tuple(a.to(DEVICE).detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.library.opcheck(torch.ops.blade.qk_norm_rope.default, (arguments[0].requires_grad_(), *arguments[1:]))


BAD = {
    "x": ({"x": torch.zeros(2, 7, 48)}, r"`x` must be floating point of shape .* \(2, 7, 48\)"),
    "norm": ({"norm": "batch"}, "`norm` must be one of none, rms-all-heads, rms, layer, got 'batch'"),
    "weight": ({"weight": torch.zeros(15)}, r"`weight` must be of shape \(16,\) with the norm 'rms', got \(15,\)"),
    "bias": ({"bias": torch.zeros(16)}, "`bias` must be None with the norm 'rms'"),
    "cos": ({"cos": None}, "`cos` and `sin` must be given together"),
    "table": ({"cos": torch.zeros(16)}, r"`cos` must be of shape \(tokens, 16\) .* got \(16,\)"),
    "start": ({"rope_start": 3}, "`rope_start` must leave room for 5 positions among 7 tokens, got 3"),
    "places": ({"places": torch.zeros(2, 7).long()}, r"`places` must be integers of shape \(3 or 1, 7\)"),
    "name": ({"implementation": "cuda"}, "`implementation` must be one of auto, triton, cpu, naive, got 'cuda'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    change, message = BAD[name]
    x, options = make("rms")
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**({"x": x} | options | change))


@needs_triton
def test_what_the_kernel_can_not_compute_is_refused():
    with pytest.raises(NotImplementedError, match="a head size that is a power of two, got 12"):
        qk_norm_rope(torch.zeros(1, 1, 1, 12), implementation="triton")
