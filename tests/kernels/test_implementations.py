"""One list of implementations for all operators: what `auto` takes, and the name that `cpu` had before."""

import pytest
import torch
from blade_kernels import block_sparse, implementations
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_selection import importance as scoring
from blade_kernels.block_selection import sampled_importance, select_blocks, selection
from blade_kernels.block_sparse import api, block_sparse_attention
from blade_kernels.implementations import check_implementation, choose_implementation, current_name
from blade_kernels.qk_norm_rope import api as norm_rope
from blade_kernels.qk_norm_rope import qk_norm_rope


def attention(**options):
    q = torch.randn(1, 40, 2, 16, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[True, False, True], [False, True, False], [True, True, True]])
    return block_sparse_attention(q, q, q, BlockMask.from_dense(keep[None, None], (16, 16)), **options)


def importance(**options):
    q = torch.randn(1, 40, 2, 16, generator=torch.Generator().manual_seed(0))
    return sampled_importance(q, q, torch.arange(0, 16, 4), torch.arange(0, 16, 4), (16, 16), **options)


def choice(**options):
    values = torch.rand(1, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    return select_blocks(values, max_blocks=4, cumulative_mass=0.5, **options).keep


def normalised(**options):
    x = torch.randn(1, 9, 2, 16, generator=torch.Generator().manual_seed(0))
    return qk_norm_rope(x, norm="rms", **options)


OPERATORS = {
    "attention": (attention, api, "naive_attention"),
    "importance": (importance, scoring, "naive_sampled_importance"),
    "choice": (choice, selection, "naive_selection"),
    "normalised": (normalised, norm_rope, "naive_norm_rope"),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_reference_is_the_former_name_of_cpu(name):
    operator, *_ = OPERATORS[name]
    assert torch.equal(operator(implementation="reference"), operator(implementation="cpu"))


@pytest.mark.parametrize("name", OPERATORS)
def test_auto_never_takes_the_specification(name, monkeypatch):
    operator, module, naive = OPERATORS[name]

    def refuse(*_, **__):
        raise AssertionError("the specification is not to be taken")

    monkeypatch.setattr(module, naive, refuse)
    assert torch.equal(operator(), operator(implementation="cpu"))
    with pytest.raises(AssertionError, match="the specification is not to be taken"):
        operator(implementation="naive")


@pytest.mark.parametrize("name", OPERATORS)
def test_unknown_names_are_refused(name):
    operator, *_ = OPERATORS[name]
    names = "auto, triton, cute, flex, cpu, naive" if name == "attention" else "auto, triton, cpu, naive"
    with pytest.raises(ValueError, match=f"`implementation` must be one of {names}, got 'cuda'"):
        operator(implementation="cuda")


def test_attention_alone_has_kernels_of_others():
    assert set(block_sparse.IMPLEMENTATIONS) == {*implementations.IMPLEMENTATIONS, "cute", "flex"}


@pytest.mark.parametrize(
    ("implementation", "device", "problem", "chosen"),
    [
        ("auto", "cuda", None, "triton"),
        ("auto", "cuda", "heads of 12", "cpu"),
        ("auto", "cpu", None, "cpu"),
        ("triton", "cpu", None, "triton"),
        ("cpu", "cuda", None, "cpu"),
        ("reference", "cuda", None, "cpu"),
        ("naive", "cuda", None, "naive"),
    ],
)
def test_choice_by_device_and_by_what_triton_can(implementation, device, problem, chosen):
    assert choose_implementation(implementation, torch.device(device), problem) == chosen


def test_triton_that_cannot_is_refused():
    with pytest.raises(NotImplementedError, match="`implementation='triton'` cannot compute this: heads of 12"):
        choose_implementation("triton", torch.device("cuda"), "heads of 12")


def test_names_of_earlier_versions():
    assert current_name("reference") == check_implementation("reference") == "cpu"
    assert [current_name(name) for name in block_sparse.IMPLEMENTATIONS] == list(block_sparse.IMPLEMENTATIONS)
    with pytest.raises(ValueError, match="got 'Reference'"):
        check_implementation("Reference")
