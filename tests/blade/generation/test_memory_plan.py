"""Settings that fit a device's memory: predicted peaks against allocations that are counted in real runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.hooks.group_offloading import ModuleGroup
from torch.profiler import ProfilerActivity, profile
from transformers import UMT5Config, UMT5EncoderModel
from weight_files import all_of, write_gguf, write_nf4, write_scaled

from blade.cli.generate import main
from blade.generation.memory import MemoryPlan, plan_memory
from blade.generation.memory_stages import Stages
from blade.generation.plan import plan_run
from blade.generation.request import GenerationRequest
from blade.models.acceleration import HEADROOM, place, quantize_blocks
from blade.models.loaded import LoadedModel
from blade.models.memory_use import Allocations, weight_bytes
from blade.models.outlines import AS_IT_IS, STORAGES
from blade.models.tiny_decoder import TinyDecoder, TinyDecoderLayout
from blade.models.transformer_files import load_transformers

LATENT = (3, 32, 32)
TEXT = 32
MOST_OFF = 0.1
"""Share of the counted bytes by which a prediction may be off."""


def make_pipe() -> WanPipeline:
    """Make a small pipeline in which weights and activations take about as much memory as each other."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=8, attention_head_dim=64, in_channels=4, out_channels=4, text_dim=64,
        freq_dim=64, ffn_dim=2048, num_layers=2,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=4096, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4))
    pipe = WanPipeline(
        tokenizer=None, text_encoder=encoder, vae=vae, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    for part in (transformer, vae, encoder):
        part.eval().requires_grad_(False)
    return pipe


def tiny_decoder() -> TinyDecoder:
    return TinyDecoder(TinyDecoderLayout(latent_channels=4)).eval().requires_grad_(False)


def calls(model: LoadedModel, decoder: TinyDecoder) -> dict[str, Callable[[], object]]:
    """Return the stages of a run."""
    device = next(decoder.parameters()).device
    ids = torch.zeros(1, TEXT, dtype=torch.int64, device=device)
    sample = torch.zeros(1, 4, *LATENT, device=device)
    inputs = model.family.example_inputs(model.transformer, LATENT)
    inputs = {name: value.to(device) for name, value in inputs.items()}

    def decode_tiny() -> None:
        for _ in decoder.stream(sample):
            pass

    return {
        "text": lambda: model.pipe.text_encoder(input_ids=ids),
        "denoising": lambda: model.transformer(**inputs),
        "full": lambda: model.pipe.vae.decode(sample, return_dict=False),
        "tiny": decode_tiny,
    }


def stages_of(pipe: WanPipeline) -> Stages:
    """Return the stages of a pipeline without its weights."""
    empty = copy.deepcopy(pipe)
    for part in (empty.transformer, empty.vae, empty.text_encoder):
        part.to("meta")
    model, decoder = LoadedModel(empty), tiny_decoder().to("meta")
    run = calls(model, decoder)
    return Stages(
        model=model,
        latent=LATENT,
        batch=1,
        encoders={"text_encoder": run["text"]},
        decode=run["full"],
        tiny=(decoder, run["tiny"]),
        streams=False,  # which a CPU has not
    )


def tensors_of(call: Callable[[], object]) -> int:
    """Return the most that the storages of tensors took at once in a call, beside what was there before.

    Without what a CPU's convolutions unfold inside, which those of a GPU do not.
    """
    with torch.no_grad(), Allocations() as memory:
        call()
    return memory.peak


def allocated(call: Callable[[], object]) -> int:
    """Return the most that PyTorch's CPU allocator held at once in a call, beside what it held before."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def counted_weights(pipe: WanPipeline) -> int:
    """Return the bytes of all storages that the parts of a pipeline hold."""
    total = sum(weight_bytes(part) for part in (pipe.transformer, pipe.vae, pipe.text_encoder))
    for module in pipe.transformer.modules():  # what bitsandbytes keeps beside its weights
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        total += 0 if state is None else state.absmax.numel() * state.absmax.element_size()
    return total


def store(pipe: WanPipeline, name: str, folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Store the weights of a pipeline's transformer in a way, by what stores them so in use."""
    transformer = pipe.transformer
    if name == AS_IT_IS:
        return
    if name in ("int8", "fp8"):
        pytest.importorskip("torchao")
        quantize_blocks(transformer, LoadedModel(pipe).family, name)
        return
    if name == "NF4":
        pytest.importorskip("bitsandbytes")
        path = write_nf4(folder, transformer, monkeypatch, ("proj_out", "condition_embedder"))
    elif name == "fp8 file":
        path = folder / "weights.safetensors"
        write_scaled(path, transformer.state_dict())
    else:
        pytest.importorskip("gguf")
        path = folder / "weights.gguf"
        write_gguf(path, transformer.state_dict(), all_of(name))
    like = LoadedModel(SimpleNamespace(transformer=transformer))
    pipe.register_modules(**load_transformers(like, str(path), dtype=torch.float32))


@pytest.mark.parametrize(
    ("storage", "decoding"),
    [*((storage, "full") for storage in STORAGES), (STORAGES[0], "tiled"), (STORAGES[0], "tiny")],
    ids=lambda value: getattr(value, "name", value),
)
def test_without_offloading_the_predicted_peak_is_what_a_run_allocates(tmp_path, monkeypatch, storage, decoding):
    pipe = make_pipe()
    stages = stages_of(pipe)
    store(pipe, storage.name, tmp_path, monkeypatch)
    predicted = stages.peak(storage, "none", decoding)
    decoder = tiny_decoder()
    run = calls(LoadedModel(pipe), decoder)
    if decoding == "tiled":
        pipe.vae.enable_tiling()
    last = run["tiny" if decoding == "tiny" else "full"]
    counted = counted_weights(pipe) + (weight_bytes(decoder) if decoding == "tiny" else 0)
    counted += max(allocated(run["text"]), allocated(run["denoising"]), tensors_of(last))
    print(f"{storage.name}, none, {decoding}: predicted {predicted / 2**20:.2f} MiB, counted {counted / 2**20:.2f}")
    assert predicted == pytest.approx(counted, rel=MOST_OFF)


class _Device:
    """Bytes that offloading has brought to a device: the hooks are Diffusers' and Accelerate's, the memory is real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: dict[int, torch.Tensor] = {}

        def around(owner: type, name: str, size: Callable[..., int] | None, key: Callable[..., Any]) -> None:
            inner = getattr(owner, name)

            def outer(*args: Any, **kwargs: Any) -> Any:
                if size is None:
                    result = inner(*args, **kwargs)
                    self.held.pop(id(key(*args)), None)
                    return result
                result = inner(*args, **kwargs)  # which first sends away what was there before
                self.held.setdefault(id(key(*args)), torch.empty(size(*args), dtype=torch.uint8))
                return result

            monkeypatch.setattr(owner, name, outer)

        def group_size(group: ModuleGroup) -> int:
            tensors = [*group.parameters, *group.buffers]
            return sum(map(weight_bytes, group.modules)) + sum(item.numel() * item.element_size() for item in tensors)

        around(ModuleGroup, "onload_", group_size, lambda group: group)
        around(ModuleGroup, "offload_", None, lambda group: group)
        before = CpuOffload.pre_forward

        def pre_forward(hook: CpuOffload, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            hook.execution_device = torch.device("cpu")  # Diffusers says cpu:0, to which Accelerate would copy
            if hook.prev_module_hook is not None:  # which it would send away if it were elsewhere
                self.held.pop(id(hook.prev_module_hook.model), None)
            if id(module) not in self.held:
                self.held[id(module)] = torch.empty(weight_bytes(module), dtype=torch.uint8)
            return before(hook, module, *args, **kwargs)

        monkeypatch.setattr(CpuOffload, "pre_forward", pre_forward)


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["model", "group"])
@pytest.mark.parametrize(
    ("name", "decoding"),
    [(AS_IT_IS, "full"), (AS_IT_IS, "tiled"), *((name, "full") for name in ("int8", "fp8 file", "Q8_0", "Q4_K"))],
)
def test_with_offloading_the_predicted_peak_is_what_a_run_allocates(tmp_path, monkeypatch, offload, name, decoding):
    storage = next(item for item in STORAGES if item.name == name)
    pipe = make_pipe()
    stages = stages_of(pipe)
    store(pipe, name, tmp_path, monkeypatch)
    run = calls(LoadedModel(pipe), tiny_decoder())
    if decoding == "tiled":
        pipe.vae.enable_tiling()
    _Device(monkeypatch)
    place(LoadedModel(pipe), torch.device("cpu"), offload)

    def until(*names: str) -> None:
        for name in names:
            run[name]()

    before = tensors_of(lambda: until("text", "denoising"))
    whole = max(before, tensors_of(lambda: until("full")))
    for last, counted in ((None, before), (decoding, whole)):
        predicted = stages.peak(storage, offload, last)
        print(f"{name}, {offload}, {last}: predicted {predicted / 2**20:.2f} MiB, counted {counted / 2**20:.2f}")
        assert predicted == pytest.approx(counted, rel=MOST_OFF)


@pytest.fixture
def stages() -> Stages:
    return stages_of(make_pipe())


def planned(stages: Stages, peak: int, **changes: Any) -> MemoryPlan:
    """Return the plan for a device whose weights and activations may fill so many bytes."""
    request = SimpleNamespace(
        **{"transformer": None, "quantize": None, "offload": "none", "decoder": "full", "vae_tiling": False, **changes}
    )
    return plan_memory(stages, request, (peak + 1) / HEADROOM / 2**30)


def test_what_loses_least_is_named_first_and_nothing_that_does_not_fit(stages):
    full, known = STORAGES[0], {item.name: item for item in STORAGES}
    everything = stages.peak(full, "none", "full")
    best = planned(stages, everything).best
    assert best is not None and (best.storage, best.offload, best.decoding) == (full, "none", "full")
    assert "no option needed" in str(best)
    parts = planned(stages, stages.peak(full, "model", "full")).best
    assert parts is not None and (parts.storage, parts.offload) == (full, "model")
    less = planned(stages, stages.peak(known["fp8 file"], "model", "full"))
    assert less.best is not None and less.best.storage.bits <= 8 and less.best.offload != "group"
    assert less.exact is not None and less.exact.storage == full and less.exact.offload == "group"
    assert "unrounded   --offload group" in str(less)
    nothing = planned(stages, 1000)
    assert nothing.best is None and nothing.exact is None and nothing.least is not None
    assert "none fits; the least is" in str(nothing) and nothing.least.offload == "group"
    for plan, peak in ((less, less.memory_gib), (planned(stages, everything), everything / 2**30 / HEADROOM)):
        assert plan.best is not None and plan.best.peak_gib <= HEADROOM * peak + 1e-6


def test_what_a_request_says_is_kept(stages):
    chosen = planned(stages, 10**9, quantize="int8", offload="group", vae_tiling=True).best
    assert chosen is not None
    assert (chosen.storage.name, chosen.offload, chosen.decoding) == ("int8", "group", "tiled")
    assert str(chosen).startswith("--quantize int8 --offload group --vae-tiling: ")


def test_packages_that_are_not_installed_are_named(stages, monkeypatch):
    monkeypatch.setattr("blade.generation.memory.find_spec", lambda name: None)
    plan = planned(stages, 10**9)
    assert plan.missing == ("quantize", "gguf", "nf4")
    assert "blade-video[quantize], blade-video[gguf], blade-video[nf4]" in str(plan)


@pytest.mark.slow
def test_a_published_model_is_planned_offline_at_its_own_size(monkeypatch):
    """Wan2.2 A14B, whose two transformers no card of 24 GiB holds at once."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    request = GenerationRequest(prompt="a cat", model="Wan-AI/Wan2.2-T2V-A14B-Diffusers", device="cpu")
    plan = plan_run(request, memory_gib=24)
    assert plan.memory is not None and plan.memory.best is not None and plan.memory.exact is not None
    assert plan.request.size == (720, 1280, 81) and plan.request.dtype == "bfloat16"
    assert plan.memory.best.storage.bits == 8 and plan.memory.best.offload == "model"
    assert plan.memory.exact.offload == "group"
    assert plan.memory.best.peak_gib <= HEADROOM * 24
    assert "24 GiB      --quantize int8 --offload model: " in str(plan)


def test_the_option_belongs_to_a_dry_run(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["a red ball moving right", "--memory", "24"])
    message = "`--memory` must not be given without `--dry-run`, got 24."
    assert ended.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["a red ball moving right", "--dry-run", "--memory", "0"])
    assert ended.value.code == 2 and "`memory` must be above 0 and finite, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["a red ball moving right", "--dry-run", "--memory", "24"])
    assert ended.value.code == 0 and "24 GiB      no option needed: " in capsys.readouterr().out
