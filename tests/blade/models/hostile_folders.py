"""Folders that would run code, or read files elsewhere, where they are loaded without being looked at."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKER = "code-ran"
"""File that appears beside a folder whose code has run."""


def evil_module(marker: Path, *names: str) -> str:
    """Return a module that leaves the marker when it is imported, with classes of these names."""
    classes = "".join(
        f"\nclass {name}:\n    config_name = 'config.json'\n"
        "    def __init__(self, *a, **k): pass\n"
        "    @classmethod\n    def from_pretrained(cls, *a, **k): return cls()\n"
        for name in names
    )
    return f"open({str(marker)!r}, 'w').close()\n{classes}"


class Bomb:
    """Leaves the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.marker), "w")


def write_bomb(path: Path, marker: Path) -> None:
    """Write a pickle that leaves the marker."""
    with path.open("wb") as file:
        pickle.dump(Bomb(marker), file)


def change(path: Path, **values: Any) -> None:
    """Change values of a JSON file, which may be missing; None takes one away."""
    content = (json.loads(path.read_text()) if path.exists() else {}) | values
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@dataclass(frozen=True)
class Hostile:
    """What is changed about a good folder, and what the error says."""

    name: str
    spoil: Callable[[Path, Path], None]
    """Called with the folder and the marker."""
    problem: str
    """A part of the message."""


def module(name: str, *classes: str) -> Callable[[Path, Path], None]:
    """Put a module into the folder."""

    def spoil(folder: Path, marker: Path) -> None:
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(evil_module(marker, *classes))

    return spoil


def index(**values: Any) -> Callable[[Path, Path], None]:
    """Change the model's index; a module `evil` lies in the folder, which stands on Python's path."""

    def spoil(folder: Path, marker: Path) -> None:
        change(folder / "model_index.json", **values)
        module("evil", "Evil", "EvilPipeline")(folder, marker)

    return spoil


def config(file: str, **values: Any) -> Callable[[Path, Path], None]:
    """Change a configuration, beside which its code lies."""

    def spoil(folder: Path, marker: Path) -> None:
        change(folder / file, **values)
        module(f"{Path(file).parent}/evil", "Evil")(folder, marker)
        (folder / Path(file).parent / "evil.py").rename(folder / "evil.py")
        for name in ("outside.json", "outside.safetensors"):
            (folder.parent / name).write_text("{}")

    return spoil


def pickled(part: str, name: str, *, keep: bool = False) -> Callable[[Path, Path], None]:
    """Replace a part's weights by a pickle, or put it beside them under another name."""

    def spoil(folder: Path, marker: Path) -> None:
        for path in list((folder / part).glob("*.safetensors")):
            path.rename(path.with_name("decoy.safetensors")) if keep else path.unlink()
        (folder / part).mkdir(exist_ok=True)
        write_bomb(folder / part / name, marker)

    return spoil


def shards(part: str, name: str, target: str) -> Callable[[Path, Path], None]:
    """Name weights elsewhere in an index; there they lie, so that a loader would take them."""

    def spoil(folder: Path, marker: Path) -> None:
        from safetensors import safe_open

        (weights,) = (folder / part).glob("*.safetensors")
        outside = folder.parent / "outside.safetensors"
        shutil.move(weights, outside)
        with safe_open(outside, "pt") as file:
            keys = list(file.keys())
        values = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, target.format(outside=outside))}
        (folder / part / f"{name}.index.json").write_text(json.dumps(values))

    return spoil


def linked(file: str) -> Callable[[Path, Path], None]:
    """Move a file, or a folder, out of the folder, and leave a link to it."""

    def spoil(folder: Path, marker: Path) -> None:
        outside = folder.parent / "outside"
        shutil.move(folder / file, outside)
        (folder / file).symlink_to(outside)

    return spoil


def device(file: str) -> Callable[[Path, Path], None]:
    """Put a pipe in a file's place, from which a reader would wait for ever."""

    def spoil(folder: Path, marker: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return spoil


def nested(file: str) -> Callable[[Path, Path], None]:
    """Nest a configuration deeply."""

    def spoil(folder: Path, marker: Path) -> None:
        (folder / file).write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")

    return spoil


AUTO_MAP = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
COMPONENT, PIPELINE = "as a component", "as its pipeline"
PICKLE, SHARD, CODE = "a pickle, which can run code", "which is no file beside it", "Python code"

MODELS = (
    Hostile("component of a module", index(scheduler=["evil", "Evil"]), COMPONENT),
    Hostile("text encoder of a module", index(text_encoder=["evil", "Evil"]), COMPONENT),
    Hostile("component of two letters", index(scheduler="os"), "must name the library and class of its scheduler"),
    Hostile("component of two keys", index(scheduler={"evil": 1, "Evil": 2}), "must name the library and class"),
    Hostile("optional component of a module", index(transformer_2=["evil", "Evil"]), COMPONENT),
    Hostile("component of the standard library", index(scheduler=["subprocess", "Popen"]), COMPONENT),
    Hostile("component of a submodule", index(scheduler=["diffusers.utils.evil", "Evil"]), COMPONENT),
    Hostile("function of Diffusers", index(scheduler=["diffusers", "logging"]), COMPONENT),
    Hostile("pipeline as a component", index(scheduler=["diffusers", "WanPipeline"]), COMPONENT),
    Hostile("ONNX as a component", index(vae=["diffusers", "OnnxRuntimeModel"]), "OnnxRuntimeModel"),
    Hostile("automatic class", index(text_encoder=["transformers", "AutoModel"]), COMPONENT),
    Hostile("class that is no name", index(scheduler=["diffusers", ["evil"]]), COMPONENT),
    Hostile("module of Diffusers' pipelines", index(scheduler=["pipeline_utils", "DiffusionPipeline"]), COMPONENT),
    Hostile("pipeline of a module", index(_class_name=["evil", "EvilPipeline"]), PIPELINE),
    Hostile("pipeline that is a model", index(_class_name="AutoencoderKLWan"), PIPELINE),
    Hostile("pipeline that is a function", index(_class_name="is_torch_available"), PIPELINE),
    Hostile("pipeline that loads others", index(_class_name="KandinskyCombinedPipeline"), "loads further models"),
    Hostile("no pipeline", index(_class_name=None), PIPELINE),
    Hostile("code in place of no custom pipeline", module("None", "WanPipeline"), CODE),
    Hostile("code of the library's name", module("scheduler/diffusers", "FlowMatchEulerDiscreteScheduler"), CODE),
    Hostile("code in the text encoder", module("text_encoder/transformers", "UMT5EncoderModel"), CODE),
    Hostile("auto_map of the text encoder", config("text_encoder/config.json", auto_map=AUTO_MAP), "auto_map"),
    Hostile(
        "auto_map of an unknown kind",
        config("text_encoder/config.json", auto_map=AUTO_MAP, model_type="evil"),
        "auto_map",
    ),
    Hostile("auto_map of the transformer", config("transformer/config.json", auto_map=AUTO_MAP), "auto_map"),
    Hostile("auto_map of the tokenizer", config("tokenizer/tokenizer_config.json", auto_map=AUTO_MAP), "auto_map"),
    Hostile(
        "auto_map deep inside", config("text_encoder/config.json", text_config={"auto_map": AUTO_MAP}), "auto_map"
    ),
    Hostile(
        "kernels of the Hub",
        config("text_encoder/config.json", attn_implementation="evil/kernels"),
        "kernels of the Hub",
    ),
    Hostile(
        "vocabulary elsewhere",
        config("tokenizer/tokenizer_config.json", tokenizer_file="../../outside.json"),
        "a file outside of its folder",
    ),
    Hostile(
        "weights elsewhere",
        config("text_encoder/config.json", transformers_weights="../../outside.safetensors"),
        "a file outside of its folder",
    ),
    Hostile(
        "adapter of another model",
        config("text_encoder/adapter_config.json", base_model_name_or_path="evil/model", peft_type="LORA"),
        "would load another model",
    ),
    Hostile("pickled transformer", pickled("transformer", "diffusion_pytorch_model.bin"), PICKLE),
    Hostile("pickled VAE", pickled("vae", "diffusion_pytorch_model.bin"), PICKLE),
    Hostile("pickled text encoder", pickled("text_encoder", "pytorch_model.bin"), PICKLE),
    Hostile(
        "pickle with a decoy", pickled("transformer", "diffusion_pytorch_model.bin", keep=True), "cannot be loaded"
    ),
    Hostile("pickled text encoder with a decoy", pickled("text_encoder", "pytorch_model.bin", keep=True), "cannot be"),
    Hostile(
        "shards above",
        shards("transformer", "diffusion_pytorch_model.safetensors", "../../outside.safetensors"),
        SHARD,
    ),
    Hostile("shards at a place", shards("vae", "diffusion_pytorch_model.safetensors", "{outside}"), SHARD),
    Hostile(
        "shards of the text encoder", shards("text_encoder", "model.safetensors", "../../outside.safetensors"), SHARD
    ),
    Hostile("linked weights", linked("transformer/diffusion_pytorch_model.safetensors"), "a link to"),
    Hostile("linked part", linked("vae"), "a link to"),
    Hostile("linked index", linked("model_index.json"), "a link to"),
    Hostile("pipe", device("scheduler/scheduler_config.json"), "no ordinary file"),
    Hostile("nested configuration", nested("transformer/config.json"), "nested too deeply"),
)
"""Models, each made from a good folder in Diffusers format."""

SCHEDULER = "scheduler/scheduler_config.json"
STUDENTS = (
    Hostile("scheduler that is a pipeline", config(SCHEDULER, _class_name="WanPipeline"), "as its scheduler"),
    Hostile("scheduler that is a function", config(SCHEDULER, _class_name="is_torch_available"), "as its scheduler"),
    Hostile("scheduler that is a model", config(SCHEDULER, _class_name="AutoModel"), "as its scheduler"),
    Hostile("scheduler of a module", config(SCHEDULER, _class_name=["evil", "Evil"]), "as its scheduler"),
    Hostile("scheduler without a class", config(SCHEDULER, _class_name=None), "as its scheduler"),
    Hostile("scheduler with code", config(SCHEDULER, auto_map=AUTO_MAP), "auto_map"),
    Hostile("linked weights", linked("pytorch_lora_weights.safetensors"), "a link to"),
    Hostile("linked scheduler", linked("scheduler"), "a link to"),
    Hostile("pickled weights", pickled(".", "pytorch_lora_weights.bin"), "pytorch_lora_weights.safetensors"),
)
"""Students, each made from a good folder with a LoRA."""

WHOLE_STUDENTS = (
    Hostile("pickled", pickled("transformer", "diffusion_pytorch_model.bin"), PICKLE),
    Hostile(
        "pickle with a decoy", pickled("transformer", "diffusion_pytorch_model.bin", keep=True), "cannot be loaded"
    ),
    Hostile(
        "shards above",
        shards("transformer", "diffusion_pytorch_model.safetensors", "../../outside.safetensors"),
        SHARD,
    ),
    Hostile("shards at a place", shards("transformer", "diffusion_pytorch_model.safetensors", "{outside}"), SHARD),
    Hostile("code", module("transformer/diffusers", "WanTransformer3DModel"), CODE),
    Hostile("auto_map", config("transformer/config.json", auto_map=AUTO_MAP), "auto_map"),
)
"""Students, each made from a good folder with a whole transformer."""

LORAS = ("style.bin", "style.pt", "style.ckpt", "style.pth")
"""Names of pickled LoRAs."""
