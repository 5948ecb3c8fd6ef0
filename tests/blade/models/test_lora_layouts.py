"""The table of LoRA layouts: each is loaded with exactly the change of weights that it stands for, or is refused.

The names of the authors' own code are written out here, apart from the expressions that translate them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from blade.models import lora_files
from blade.models.loaded import LoadedModel
from blade.models.lora_files import LoraFile, read_lora
from blade.models.lora_layouts import ModuleNames
from blade.models.loras import load_loras, merge_loras

STRENGTH = 0.5
RANK = 2

WAN = {
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.0.attn1.to_out.0": "blocks.0.self_attn.o",
    "blocks.1.attn2.to_k": "blocks.1.cross_attn.k",
    "blocks.2.ffn.net.0.proj": "blocks.2.ffn.0",
    "blocks.2.ffn.net.2": "blocks.2.ffn.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "proj_out": "head.head",
    "patch_embedding": "patch_embedding",
}
HUNYUAN = {
    "transformer_blocks.0.attn.to_out.0": "double_blocks.0.img_attn_proj",
    "transformer_blocks.0.attn.to_add_out": "double_blocks.0.txt_attn_proj",
    "transformer_blocks.0.norm1_context.linear": "double_blocks.0.txt_mod.linear",
    "transformer_blocks.0.ff.net.0.proj": "double_blocks.0.img_mlp.fc1",
    "transformer_blocks.0.ff_context.net.2": "double_blocks.0.txt_mlp.fc2",
    "single_transformer_blocks.0.proj_out": "single_blocks.0.linear2",
    "single_transformer_blocks.0.norm.linear": "single_blocks.0.modulation.linear",
    "context_embedder.token_refiner.refiner_blocks.0.attn.to_out.0": "txt_in.individual_token_refiner.blocks.0."
    "self_attn_proj",
    "x_embedder.proj": "img_in.proj",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
}
FUSED = {
    "double_blocks.0.img_attn_qkv": [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"],
    "double_blocks.0.txt_attn_qkv": [f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"],
    "single_blocks.0.linear1": [
        *(f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"),
        "single_transformer_blocks.0.proj_mlp",
    ],
}
LTX = {
    "transformer_blocks.0.attn1.to_q": "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.1.ff.net.2": "transformer_blocks.1.ff.net.2",
    "proj_in": "patchify_proj",
    "time_embed.linear": "adaln_single.linear",
}
COG = {name: name for name in ("transformer_blocks.0.attn1.to_k", "transformer_blocks.1.ff.net.0.proj")}

ORIGINAL = {"WanPipeline": WAN, "HunyuanVideoPipeline": HUNYUAN, "LTXPipeline": LTX, "CogVideoXPipeline": COG}


@dataclass
class Written:
    """A file and what it is to change."""

    tensors: dict[str, torch.Tensor]
    changes: dict[str, torch.Tensor]
    """By parameter."""
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] | None = None
    name: str = "lora.safetensors"
    unused: str = ""
    """The end of the warning."""

    def save(self, folder: Path) -> Path:
        save_file(
            {key: tensor.contiguous() for key, tensor in self.tensors.items()}, folder / self.name, self.metadata
        )
        if self.config:
            (folder / "adapter_config.json").write_text(json.dumps(self.config))
        return folder / self.name


Write = Callable[[Any, Mapping[str, str]], Written]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def pair(weight: torch.Tensor, rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor]:
    return noise(rank, *weight.shape[1:]), noise(len(weight), rank, *(1,) * (weight.ndim - 2))


def product(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:])


def pairs(
    key: Callable[[str, str], str],
    *,
    down: str = "lora_A.weight",
    up: str = "lora_B.weight",
    alpha: float | None = None,
    scale: float = 1.0,
    only: Iterable[str] | None = None,
    **options: Any,
) -> Write:
    """Return a writer of pairs.

    Args:
        key: makes the beginning of a key of a module's names in Diffusers and in the authors' code.
        down: the end of a key.
        up: the end of a key.
        alpha: is written beside each pair.
        scale: of the change.
        only: modules, where not all are written.
        options: of `Written`.
    """

    def write(transformer: Any, names: Mapping[str, str]) -> Written:
        tensors, changes = {}, {}
        for rank, (name, original) in enumerate(names.items(), start=1):
            if only is not None and name not in only:
                continue
            weight = transformer.get_parameter(f"{name}.weight")
            size = RANK if options else rank  # PEFT's alpha is for a rank
            a, b = pair(weight, size)
            begin = key(name, original)
            tensors |= {f"{begin}.{down}": a, f"{begin}.{up}": b}
            if alpha is not None:
                tensors[f"{begin}.alpha"] = torch.tensor(alpha)
            changes[f"{name}.weight"] = scale * product(a, b) * (1 if alpha is None else alpha / size)
        return Written(tensors, changes, **options)

    return write


def differences(prefix: str, *names: tuple[str, str]) -> Write:
    """Return a writer of differences of parameters, by their names in Diffusers and in the file."""

    def write(transformer: Any, _: Mapping[str, str]) -> Written:
        changes = {name: noise(*transformer.get_parameter(name).shape) for name, _ in names}
        return Written({prefix + key: changes[name] for name, key in names}, changes)

    return write


def both(*writers: Write) -> Write:
    """Return a writer of several things into a file."""

    def write(transformer: Any, names: Mapping[str, str]) -> Written:
        written = Written({}, {})
        for item in (writer(transformer, names) for writer in writers):
            written.tensors |= item.tensors
            written.changes |= item.changes
            written.unused = written.unused or item.unused
        return written

    return write


def fused(prefix: str, *, flat: bool, alpha: float | None = None) -> Write:
    """Return a writer of HunyuanVideo's fused projections."""

    def write(transformer: Any, _: Mapping[str, str]) -> Written:
        tensors, changes = {}, {}
        for original, names in FUSED.items():
            weights = [transformer.get_parameter(f"{name}.weight") for name in names]
            a, b = noise(RANK, weights[0].shape[1]), noise(sum(map(len, weights)), RANK)
            begin = prefix + (original.replace(".", "_") if flat else original)
            ends = ("lora_down.weight", "lora_up.weight") if flat else ("lora_A.weight", "lora_B.weight")
            tensors |= dict(zip((f"{begin}.{end}" for end in ends), (a, b), strict=True))
            if alpha is not None:
                tensors[f"{begin}.alpha"] = torch.tensor(alpha)
            for name, rows in zip(names, b.split([len(weight) for weight in weights]), strict=True):
                changes[f"{name}.weight"] = rows @ a * (1 if alpha is None else alpha / RANK)
        return Written(tensors, changes)

    return write


def tensors(values: Mapping[str, tuple[int, ...]], unused: str = "") -> Write:
    """Return a writer of tensors of given shapes, which change nothing."""

    def write(_: Any, __: Mapping[str, str]) -> Written:
        return Written({key: noise(*shape) for key, shape in values.items()}, {}, unused=unused)

    return write


def flat(name: str, original: str) -> str:
    return "lora_unet_" + original.replace(".", "_")


def comfy(name: str, original: str) -> str:
    return f"diffusion_model.{original}"


DIFFUSERS = pairs(lambda name, _: f"transformer.{name}")
COMFY = pairs(comfy)
KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight"}
DEFAULT = {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}
PEFT = {"r": RANK, "lora_alpha": 6, "rank_pattern": {}, "alpha_pattern": {}}
METADATA = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in PEFT.items()})}
SELF_ATTENTION = ("blocks.0.attn1.to_q", "blocks.0.attn1.to_out.0")
Q = "transformer.blocks.0.attn1.to_q"
Q2 = "lora_unet_blocks_0_self_attn_q.lora_up.weight"

LOADED: dict[str, list[tuple[str, Write]]] = {
    "Diffusers: transformer.": [(pipeline, DIFFUSERS) for pipeline in ORIGINAL],
    "Diffusers, alpha in the header": [
        (pipeline, pairs(lambda name, _: f"transformer.{name}", scale=3, metadata=METADATA)) for pipeline in ORIGINAL
    ],
    "Diffusers' names, bare": [(pipeline, pairs(lambda name, _: name)) for pipeline in ORIGINAL],
    "PEFT: base_model.model.": [
        (pipeline, pairs(lambda name, _: f"base_model.model.{name}")) for pipeline in ORIGINAL
    ],
    "PEFT, alpha in adapter_config.json": [
        (
            pipeline,
            pairs(lambda name, _: f"base_model.model.{name}", scale=3, config=PEFT, name="adapter_model.safetensors"),
        )
        for pipeline in ORIGINAL
    ],
    "DiffSynth: the authors' names, bare": [
        (pipeline, pairs(lambda _, original: original, **DEFAULT)) for pipeline in ("WanPipeline", "LTXPipeline")
    ],
    "DiffSynth: pipe.dit.": [("WanPipeline", pairs(lambda _, original: f"pipe.dit.{original}"))],
    "ComfyUI: diffusion_model.": [(pipeline, COMFY) for pipeline in ORIGINAL],
    "ComfyUI, lora_down and alpha": [(pipeline, pairs(comfy, alpha=3.0, **KOHYA)) for pipeline in ORIGINAL],
    "kohya, musubi: lora_unet_ with alpha": [(pipeline, pairs(flat, alpha=3.0, **KOHYA)) for pipeline in ORIGINAL],
    "kohya, a second underscore": [
        ("WanPipeline", pairs(lambda _, original: "lora_unet__" + original.replace(".", "_"), alpha=1.0, **KOHYA))
    ],
    "LyCORIS": [
        ("WanPipeline", pairs(lambda _, original: "lycoris_" + original.replace(".", "_"), alpha=1.0, **KOHYA))
    ],
    "kohya, Diffusers' names": [
        (pipeline, pairs(lambda name, _: "lora_unet_" + name.replace(".", "_"), alpha=1.0, **KOHYA))
        for pipeline in ORIGINAL
    ],
    "kohya, self-attention only": [("WanPipeline", pairs(flat, alpha=3.0, only=SELF_ATTENTION, **KOHYA))],
    "ComfyUI, self-attention only": [("WanPipeline", pairs(comfy, only=SELF_ATTENTION))],
    "fused projections": [
        ("HunyuanVideoPipeline", fused(prefix, flat=False)) for prefix in ("diffusion_model.", "transformer.", "")
    ],
    "fused projections, kohya": [("HunyuanVideoPipeline", fused("lora_unet_", flat=True, alpha=6.0))],
    "diff_b beside pairs": [
        (
            "WanPipeline",
            both(
                COMFY,
                differences("diffusion_model.", ("blocks.0.attn1.to_q.bias", "blocks.0.self_attn.q.diff_b")),
            ),
        )
    ],
    "diff_b alone": [
        (
            "WanPipeline",
            differences("diffusion_model.", ("condition_embedder.time_proj.bias", "time_projection.1.diff_b")),
        )
    ],
    "norms and modulation: diff, diff_b": [
        (
            "WanPipeline",
            differences(
                "diffusion_model.",
                ("blocks.0.attn1.norm_q.weight", "blocks.0.self_attn.norm_q.diff"),
                ("blocks.1.attn2.norm_k.weight", "blocks.1.cross_attn.norm_k.diff"),
                ("blocks.2.norm2.weight", "blocks.2.norm3.diff"),
                ("blocks.2.norm2.bias", "blocks.2.norm3.diff_b"),
                ("blocks.2.scale_shift_table", "blocks.2.modulation.diff"),
                ("scale_shift_table", "head.modulation.diff"),
            ),
        )
    ],
    "ffn.*.diff": [
        (
            "WanPipeline",
            both(
                differences(
                    "diffusion_model.",
                    ("blocks.1.ffn.net.0.proj.weight", "blocks.1.ffn.0.diff"),
                    ("blocks.1.ffn.net.2.bias", "blocks.1.ffn.2.diff_b"),
                ),
                COMFY,
            ),
        )
    ],
    "a text encoder's besides": [
        (
            "WanPipeline",
            both(
                COMFY,
                tensors(
                    {"lora_te1_layer.lora_down.weight": (2, 8), "lora_te1_layer.lora_up.weight": (8, 2)},
                    "1 of 11 modules are left out of transformer: lora_te1_layer (no such module)",
                ),
            ),
        )
    ],
    "a module twice": [
        (
            "WanPipeline",
            both(
                pairs(comfy, only=SELF_ATTENTION),
                tensors(
                    {"lora_unet_blocks_0_self_attn_q.lora_down.weight": (2, 32), Q2: (32, 2)},
                    "1 of 3 modules are left out of transformer: lora_unet_blocks_0_self_attn_q (the file has this "
                    "module twice)",
                ),
            ),
        )
    ],
}
"""Layouts that are loaded, each with the pipelines that it is written for."""

REFUSED: dict[str, tuple[Write, str]] = {
    "DoRA by columns": (
        tensors({f"{Q}.lora_A.weight": (2, 32), f"{Q}.lora_B.weight": (32, 2), f"{Q}.dora_scale": (1, 32)}),
        "transformer.blocks.0.attn1.to_q (its DoRA magnitude is 1x32 instead of one of each of 32 rows)",
    ),
    "LoKr": (
        tensors({f"{Q}.lokr_w1": (2, 2), f"{Q}.lokr_w2": (16, 16)}),
        "transformer.blocks.0.attn1.to_q (lokr_w1 is of no LoRA)",
    ),
    "LoHa": (tensors({f"{Q}.hada_w1_a": (32, 2)}), "(hada_w1_a is of no LoRA)"),
    "half a pair": (
        tensors({f"{Q}.lora_A.weight": (2, 32)}),
        "transformer.blocks.0.attn1.to_q (its lora_B is missing)",
    ),
    "alpha alone": (tensors({f"{Q}.alpha": ()}), "transformer.blocks.0.attn1.to_q (alpha alone)"),
    "another size": (
        tensors({f"{Q}.lora_A.weight": (2, 64), f"{Q}.lora_B.weight": (64, 2)}),
        "transformer.blocks.0.attn1.to_q (64x64 of rank 2 instead of 32x32)",
    ),
    "another model": (
        tensors(
            {"lora_unet_down_blocks_0.lora_down.weight": (2, 8), "lora_unet_down_blocks_0.lora_up.weight": (8, 2)}
        ),
        "none of its 1 modules fits transformer: lora_unet_down_blocks_0 (no such module)",
    ),
    "whole weights beside": (
        tensors({"blocks.0.attn1.to_q.weight": (32, 32), "blocks.0.attn1.to_k.alpha": ()}),
        "blocks.0.attn1.to_q.weight (no such module)",
    ),
    "a pair for a norm": (
        tensors({"blocks.0.norm3.lora_A.weight": (2, 32), "blocks.0.norm3.lora_B.weight": (32, 2)}),
        "blocks.0.norm3 (it takes no pair of matrices here)",
    ),
    "a difference of another shape": (tensors({"blocks.0.norm3.diff": (8,)}), "blocks.0.norm3 (8 instead of 32)"),
    "a bias where there is none": (
        tensors({"blocks.0.self_attn.norm_q.diff_b": (32,)}),
        "blocks.0.self_attn.norm_q (it has no bias here)",
    ),
    "nothing": (tensors({}), "none of its 0 modules fits transformer: the file is empty"),
}
"""Layouts that are refused, with the sentence."""


@pytest.fixture(autouse=True)
def same_noise() -> None:
    torch.manual_seed(0)


def weights_of(transformer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in transformer.named_parameters()}


@pytest.mark.parametrize(
    ("pipeline", "write"),
    [
        pytest.param(pipeline, write, id=f"{layout}, {pipeline.removesuffix('Pipeline')} {number}")
        for layout, rows in LOADED.items()
        for number, (pipeline, write) in enumerate(rows)
    ],
)
def test_each_layout_changes_the_weights_as_it_says(pipeline, write, small_pipelines, tmp_path, caplog) -> None:
    """All parameters are compared: those that the file does not name stay as they are."""
    model = LoadedModel(small_pipelines[pipeline]())
    written = write(model.transformer, ORIGINAL[pipeline])
    path, before = written.save(tmp_path), weights_of(model.transformer)
    (reach,) = load_loras(model, [f"{path}={STRENGTH}"]).values()
    assert reach == {
        "transformer": len({name.removesuffix(".bias").removesuffix(".weight") for name in written.changes})
    }
    merge_loras(model)
    after = weights_of(model.transformer)
    assert set(after) == set(before)
    for name, weight in after.items():
        expected = before[name] + STRENGTH * written.changes.get(name, torch.zeros(()))
        torch.testing.assert_close(weight, expected, msg=lambda text, name=name: f"{name}: {text}")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == bool(written.unused) and all(text.endswith(written.unused) for text in warnings)


@pytest.mark.parametrize(("write", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used_is_refused_by_name(write, sentence, small_pipelines, tmp_path) -> None:
    model = LoadedModel(small_pipelines["WanPipeline"]())
    path, before = write(model.transformer, WAN).save(tmp_path), weights_of(model.transformer)
    with pytest.raises(ValueError, match=r"lora\.safetensors cannot be loaded onto this model: none of its") as caught:
        load_loras(model, [str(path)])
    assert sentence in str(caught.value) and str(caught.value).endswith(
        "Take a LoRA that was trained from this model."
    )
    after = weights_of(model.transformer)
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("write", [COMFY, pairs(comfy, alpha=3.0, **KOHYA), DIFFUSERS], ids=["comfy", "alpha", "own"])
def test_diffusers_makes_the_same_of_what_it_knows(write, small_pipelines, tmp_path) -> None:
    names = {name: original for name, original in WAN.items() if name.startswith("blocks.")}
    ours, theirs = (LoadedModel(small_pipelines["WanPipeline"]()) for _ in range(2))
    theirs.transformer.load_state_dict(ours.transformer.state_dict())
    path = write(ours.transformer, names).save(tmp_path)
    load_loras(ours, [str(path)])
    theirs.pipe.load_lora_weights(str(path), adapter_name="theirs")
    for model in (ours, theirs):
        merge_loras(model)
    for name, weight in ours.transformer.named_parameters():
        torch.testing.assert_close(weight, theirs.transformer.get_parameter(name))


def test_an_adapter_loaded_before_is_no_obstacle(small_pipelines, tmp_path) -> None:
    """Differences go to the weights below it."""
    model = LoadedModel(small_pipelines["WanPipeline"]())
    before = weights_of(model.transformer)
    written = [write(model.transformer, WAN) for _, write in (*LOADED["ffn.*.diff"], *LOADED["diff_b beside pairs"])]
    paths = []
    for number, item in enumerate(written):
        item.name = f"{number}.safetensors"
        paths.append(str(item.save(tmp_path)))
    assert len(load_loras(model, [paths[0], f"{paths[1]}=-1"])) == 2
    merge_loras(model)
    for name, weight in weights_of(model.transformer).items():
        first, second = (item.changes.get(name, torch.zeros(())) for item in written)
        torch.testing.assert_close(weight, before[name] + first - second)


def test_differences_are_not_added_when_a_later_lora_fails(small_pipelines, tmp_path) -> None:
    model = LoadedModel(small_pipelines["WanPipeline"]())
    before = weights_of(model.transformer)
    path = LOADED["norms and modulation: diff, diff_b"][0][1](model.transformer, WAN).save(tmp_path)
    save_file({"unknown.diff": torch.zeros(2)}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"bad\.safetensors cannot be loaded"):
        load_loras(model, [str(path), str(tmp_path / "bad.safetensors")])
    after = weights_of(model.transformer)
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_a_folder_of_several_files_wants_one_of_them_named(small_pipelines, tmp_path) -> None:
    model = LoadedModel(small_pipelines["WanPipeline"]())
    for name in ("a", "b"):
        written = DIFFUSERS(model.transformer, WAN)
        written.name = f"{name}.safetensors"
        written.save(tmp_path)
    with pytest.raises(ValueError, match=r"one safetensors file, or the file be named, .*/FILE; it has a.s.*, b.s"):
        load_loras(model, [str(tmp_path)])
    (tmp_path / "b.safetensors").rename(tmp_path / "pytorch_lora_weights.safetensors")
    assert load_loras(model, [str(tmp_path)]) == {str(tmp_path): {"transformer": len(WAN)}}


def test_a_damaged_file_is_named(small_pipelines, tmp_path) -> None:
    (tmp_path / "lora.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"`loras` .*lora.safetensors cannot be read as safetensors"):
        load_loras(LoadedModel(small_pipelines["WanPipeline"]()), [str(tmp_path / "lora.safetensors")])


def test_patterns_of_alpha_and_rank_stabilised_scales_are_kept(tmp_path) -> None:
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_q": 2, "^blocks.1.to_k": 1}, "use_rslora": False}
    file = LoraFile(tmp_path, {}, config)
    assert [file.scale(f"blocks.1.{name}", 4) for name in ("to_q", "to_k", "to_v")] == [0.5, 0.25, 2.0]
    assert LoraFile(tmp_path, {}, config | {"use_rslora": True}).scale("blocks.1.to_v", 4) == 4.0
    assert LoraFile(tmp_path, {}).scale("blocks.1.to_v", 4) == 1.0


def test_a_file_that_diffusers_has_saved_is_loaded_as_diffusers_loads_it(small_pipelines, tmp_path) -> None:
    """With ranks and alphas of its own for some modules."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipes = [small_pipelines["WanPipeline"]() for _ in range(3)]
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_k"], rank_pattern={"blocks.0.attn1.to_q": 2},
        alpha_pattern={"to_k": 3}, init_lora_weights=False,
    )  # fmt: skip
    pipes[0].transformer.add_adapter(config)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipes[0].transformer))
    kept = {"transformer_lora_adapter_metadata": pipes[0].transformer.peft_config["default"].to_dict()}
    pipes[0].save_lora_weights(tmp_path, transformer_lora_layers=layers, **kept)
    ours, theirs = (LoadedModel(pipe) for pipe in pipes[1:])
    theirs.transformer.load_state_dict(ours.transformer.state_dict())
    load_loras(ours, [str(tmp_path)])
    theirs.pipe.load_lora_weights(str(tmp_path))
    for model in (ours, theirs):
        merge_loras(model)
    for name, weight in ours.transformer.named_parameters():
        torch.testing.assert_close(weight, theirs.transformer.get_parameter(name))


def test_a_pipeline_that_takes_no_loras_says_so(small_pipelines, tmp_path) -> None:
    with pytest.raises(
        ValueError, match=r"must not be given for a \w+: Diffusers loads no LoRAs onto it, got 'style'"
    ):
        load_loras(LoadedModel(small_pipelines["HunyuanVideo15Pipeline"]()), ["style"])


def test_files_of_the_hub_are_named_behind_its_id(small_pipelines, tmp_path, monkeypatch) -> None:
    """With PEFT's configuration from beside the file."""
    model = LoadedModel(small_pipelines["WanPipeline"]())
    (tmp_path / "peft").mkdir()
    pairs(lambda name, _: name, config=PEFT, name="adapter_model.safetensors")(model.transformer, WAN).save(
        tmp_path / "peft"
    )
    DIFFUSERS(model.transformer, WAN).save(tmp_path)
    names = ["README.md", *(path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*.*")))]
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    monkeypatch.setattr(lora_files, "repository_info", lambda name, option, file: info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, **_: str(tmp_path / file))
    assert read_lora("me/loras/lora.safetensors").config == {}
    assert read_lora("me/loras/peft/adapter_model.safetensors").config == PEFT
    with pytest.raises(ValueError, match=r"me/loras has no safetensors file lora.safetensor; did you mean lora"):
        read_lora("me/loras/lora.safetensor")
    with pytest.raises(
        ValueError, match=r"me/loras must hold one safetensors file, or the file be named, me/loras/FILE"
    ):
        read_lora("me/loras")
    assert len(load_loras(model, ["me/loras/lora.safetensors=0.5", "me/loras/peft/adapter_model.safetensors"])) == 2


def test_a_misspelled_file_is_named_with_what_is_beside_it(tmp_path) -> None:
    (tmp_path / "style.safetensors").touch()
    with pytest.raises(
        ValueError, match=r"is no file or folder here and no Hub id, .*did you mean .*/style.safetensors\?"
    ):
        read_lora(str(tmp_path / "stile.safetensors"))


@pytest.mark.parametrize("pipeline", ["WanPipeline", "WanImageToVideoPipeline", "LTXPipeline", "HunyuanVideoPipeline"])
def test_the_authors_names_are_those_that_diffusers_converts(pipeline, small_pipelines, make_wan, monkeypatch) -> None:
    """Weights under the translated names become the model's own again."""
    from diffusers.loaders import single_file_utils

    model = LoadedModel(small_pipelines[pipeline]())
    if pipeline == "WanImageToVideoPipeline":
        model.pipe.transformer = make_wan(image_dim=8, added_kv_proj_dim=32)
    weights, original = model.transformer.state_dict(), {}
    names = ModuleNames(model.transformer, model.family)
    for name, targets in names.originals.items():
        reorder = names.reordering(name, by_head=False) or (lambda rows: rows)  # its own inverse
        if set(targets) <= {key.rpartition(".")[0] for key in weights}:
            for kind in ("weight", "bias"):
                rows = [weights[f"{target}.{kind}"] for target in targets if f"{target}.{kind}" in weights]
                original |= {f"{name}.{kind}": reorder(torch.cat(rows))} if rows else {}
        elif targets[0] in weights:
            original[name] = weights[targets[0]]
    if pipeline == "HunyuanVideoPipeline":  # Diffusers' converter has the width of the published model written into it
        width = model.transformer.config.num_attention_heads * model.transformer.config.attention_head_dim
        split = torch.split
        monkeypatch.setattr(torch, "split", lambda x, sizes, dim: split(x, (*(width,) * 3, len(x) - 3 * width), dim))
    family = "ltx" if pipeline == "LTXPipeline" else "wan" if pipeline.startswith("Wan") else "hunyuan_video"
    ending = "checkpoint_to_diffusers" if family == "ltx" else "to_diffusers"
    converted = getattr(single_file_utils, f"convert_{family}_transformer_{ending}")(original)
    assert set(converted) == set(weights)
    assert all(torch.equal(converted[name], weights[name]) for name in weights)


def test_a_lora_of_text_to_video_fits_a_model_that_sees_images(small_pipelines, make_wan, tmp_path) -> None:
    """For which Diffusers adds pairs of zeros."""
    model = LoadedModel(small_pipelines["WanImageToVideoPipeline"]())
    model.pipe.transformer = make_wan(image_dim=8, added_kv_proj_dim=32)
    written = pairs(comfy, alpha=3.0, **KOHYA)(model.transformer, WAN)
    path, before = written.save(tmp_path), weights_of(model.transformer)
    assert load_loras(model, [str(path)]) == {str(path): {"transformer": len(WAN)}}
    merge_loras(model)
    for name, weight in weights_of(model.transformer).items():
        torch.testing.assert_close(weight, before[name] + written.changes.get(name, torch.zeros(())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_files_of_few_bits_are_loaded_into_a_model_of_few_bits(dtype, small_pipelines, tmp_path) -> None:
    model = LoadedModel(small_pipelines["WanPipeline"]())
    model.transformer.to(torch.bfloat16)
    write = both(pairs(comfy, only=["blocks.0.attn1.to_q"]), *(write for _, write in LOADED["diff_b alone"]))
    written = write(model.transformer, WAN)
    written.tensors = {key: tensor.to(dtype) for key, tensor in written.tensors.items()}
    path, before = written.save(tmp_path), weights_of(model.transformer)
    load_loras(model, [str(path)])
    merge_loras(model)
    for name, weight in weights_of(model.transformer).items():
        change = written.changes.get(name, torch.zeros(1))
        expected = before[name].float() + change
        error = (weight.float() - expected).abs().max()
        assert weight.dtype == torch.bfloat16 and error <= 0.1 * change.abs().max() + 0.01 * expected.abs().max()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[1]", "no JSON object, but a list"),
        ("{", "cannot be read as JSON"),
        ('{"lora_alpha": "much"}', "must have numbers for `lora_alpha`, got 'much'"),
        ('{"transformer.alpha_pattern": [1]}', "must have an `alpha_pattern` by module"),
        ('{"alpha_pattern": {"to_q": {}}}', "must have numbers for `lora_alpha`"),
    ],
)
def test_a_header_of_other_values_is_refused(header, message, tmp_path) -> None:
    save_file({"a.diff": torch.zeros(1)}, tmp_path / "a.safetensors", {"lora_adapter_metadata": header})
    with pytest.raises(ValueError, match=message):
        read_lora(str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(("ending", "key"), [("lora_magnitude_vector", DIFFUSERS), ("dora_scale", COMFY)])
def test_dora_is_what_peft_makes_of_it_at_every_strength(ending, key, small_pipelines, tmp_path) -> None:
    ours, theirs = (LoadedModel(small_pipelines["WanPipeline"]()) for _ in range(2))
    theirs.transformer.load_state_dict(ours.transformer.state_dict())
    names = {name: original for name, original in WAN.items() if name != "patch_embedding"}
    written, own = key(ours.transformer, names), DIFFUSERS(ours.transformer, names)
    for (mine, tensor), (theirs_key, _) in list(zip(written.tensors.items(), own.tensors.items(), strict=True)):
        own.tensors[theirs_key] = tensor
        if mine.endswith("lora_B.weight"):
            norms = torch.rand(len(tensor)) + 0.5
            own.tensors[theirs_key.replace("lora_B.weight", "lora_magnitude_vector")] = norms
            mine = mine.replace("lora_B.weight", ending)
            written.tensors |= {mine: norms if ending == "lora_magnitude_vector" else norms[:, None]}
    load_loras(ours, [f"{written.save(tmp_path)}={STRENGTH}"])
    theirs.pipe.load_lora_weights(own.tensors, adapter_name="theirs")
    theirs.pipe.set_adapters("theirs", STRENGTH)
    for model in (ours, theirs):
        merge_loras(model)
    for name, weight in ours.transformer.named_parameters():
        torch.testing.assert_close(weight, theirs.transformer.get_parameter(name))


def test_dora_beside_plain_pairs_is_refused(small_pipelines, tmp_path) -> None:
    model = LoadedModel(small_pipelines["WanPipeline"]())
    written = pairs(comfy, only=SELF_ATTENTION)(model.transformer, WAN)
    written.tensors["diffusion_model.blocks.0.self_attn.q.dora_scale"] = torch.ones(32, 1)
    with pytest.raises(
        ValueError,
        match=r"1 of its 2 pairs are DoRA and others, such as blocks\.0\.attn1\.to_out\.0, are not, .* two LoR",
    ):
        load_loras(model, [str(written.save(tmp_path))])


def test_a_weight_that_is_set_is_reached_at_full_strength(small_pipelines, tmp_path) -> None:
    model = LoadedModel(small_pipelines["WanPipeline"]())
    before, value = model.transformer.proj_out.weight.detach().clone(), noise(*model.transformer.proj_out.weight.shape)
    save_file(
        {"head.head.set_weight": value, "blocks.0.modulation.diff_param": torch.ones(1, 6, 32)},
        tmp_path / "a.safetensors",
    )
    table = model.transformer.blocks[0].scale_shift_table.detach().clone()
    load_loras(model, [f"{tmp_path / 'a.safetensors'}=0.5"])
    torch.testing.assert_close(model.transformer.proj_out.weight, (before + value) / 2)
    torch.testing.assert_close(model.transformer.blocks[0].scale_shift_table, table + 0.5)
    load_loras(model, [str(tmp_path / "a.safetensors")])
    assert torch.equal(model.transformer.proj_out.weight, value)


def test_the_headers_alpha_is_of_pairs_without_their_own(tmp_path) -> None:
    save_file({"a.lora_A.weight": torch.ones(4, 2)}, tmp_path / "a.safetensors", {"alpha": "8"})
    file = read_lora(str(tmp_path / "a.safetensors"))
    assert file.scale("a", 4) == 2.0 and not file.is_whole
    save_file({"a.lora_A.weight": torch.ones(4, 2)}, tmp_path / "b.safetensors", {"alpha": "much"})
    assert read_lora(str(tmp_path / "b.safetensors")).scale("a", 4) == 1.0
