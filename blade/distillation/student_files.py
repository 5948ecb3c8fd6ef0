"""A student as a folder: weights, sampler, attention, and a model card on its training and use."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, StrictUndefined
from safetensors.torch import load_file, save_file

from blade.attention.config import BladeConfig
from blade.common.files import folder_updated
from blade.common.tables import markdown_code, markdown_text
from blade.distillation.config import DistillationConfig, WeightsConfig
from blade.distillation.trajectory import SMALLEST
from blade.families.protocol import ModelFamily
from blade.families.registry import find_family
from blade.families.transformers import Transformer
from blade.models.source import BUNDLED
from blade.models.untrusted import check_files
from blade.students.scheduler import FewStepScheduler
from blade.students.source import CONDITION_NAME, FULL_WEIGHT_NAME, SCHEDULER_FOLDER, TRANSFORMER_FOLDER, WEIGHT_NAME
from blade.students.step_condition import ATTRIBUTE

CONFIG_NAME = "distillation.yaml"
"""File of the configuration that made the student."""

CARD_NAME = "README.md"
"""File of the model card."""


def write_student(
    folder: Path,
    *,
    transformer: Transformer,
    weights: Mapping[str, torch.Tensor],
    config: DistillationConfig,
    sampler: FewStepScheduler,
    attention: BladeConfig | None,
    facts: Mapping[str, Any],
    dtype: torch.dtype,
) -> None:
    """Write a student; existing files are replaced one by one, each atomically.

    Args:
        folder: made if missing.
        transformer: the base, for its configuration.
        weights: the student's unsharded weights, by the names of `trained_parameters`.
        config: the configuration that made it.
        sampler: its sampler.
        attention: its attention; None: dense.
        facts: further values for the model card.
        dtype: type of the written weights.

    Raises:
        OSError: if a file cannot be written.
    """
    with folder_updated(folder) as temporary:
        marker = f".{ATTRIBUTE}."
        condition = {name: weight for name, weight in weights.items() if marker in name}
        network = {name: weight.to(dtype).contiguous() for name, weight in weights.items() if name not in condition}
        if config.weights.full:
            target = temporary / TRANSFORMER_FOLDER
            transformer.save_config(target)
            save_file(network, target / FULL_WEIGHT_NAME, metadata={"format": "pt"})
        else:
            save_file(_lora(network, config.weights.alpha / config.weights.rank), temporary / WEIGHT_NAME)
        if condition:
            save_file({"weight": next(iter(condition.values())).contiguous()}, temporary / CONDITION_NAME)
        sampler.save_pretrained(temporary / SCHEDULER_FOLDER)
        (attention or BladeConfig(attention="dense", kind="student")).save_pretrained(temporary)
        text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
        (temporary / CONFIG_NAME).write_text(text, encoding="utf-8")
        (temporary / CARD_NAME).write_text(
            _card(config, sampler, attention, facts, find_family(transformer)), encoding="utf-8"
        )


def read_weights(folder: Path, config: WeightsConfig) -> dict[str, torch.Tensor]:
    """Read a student's weights, by the names of `trained_parameters`.

    Args:
        folder: a folder that `write_student` wrote.
        config: the expected kind and rank.

    Raises:
        ValueError: if the folder has no weights of this kind or rank.
    """
    name = f"{TRANSFORMER_FOLDER}/{FULL_WEIGHT_NAME}" if config.full else WEIGHT_NAME
    path = folder / name
    check_files(folder, name, f"`weights.start_from` {folder}")
    if not path.is_file():
        raise ValueError(f"`weights.start_from` must be a student's folder with a {path.name}, got {folder}.")
    weights = {name.removeprefix("transformer."): weight.float() for name, weight in load_file(path).items()}
    if config.full:
        return weights
    ranks = {weight.shape[0] for name, weight in weights.items() if ".lora_A." in name}
    if ranks != {config.rank}:
        raise ValueError(f"`weights.start_from` must have the rank {config.rank} of `weights.rank`, got {ranks}.")
    scale = config.rank / config.alpha
    return {name: weight * scale if ".lora_B." in name else weight for name, weight in weights.items()}


def _lora(weights: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Return a LoRA under Diffusers' keys, with its scale multiplied into its weights."""
    return {
        f"transformer.{name}": (weight * scale if ".lora_B." in name else weight).contiguous()
        for name, weight in weights.items()
    }


def _card(
    config: DistillationConfig,
    sampler: FewStepScheduler,
    attention: BladeConfig | None,
    facts: Mapping[str, Any],
    family: ModelFamily,
) -> str:
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"text": markdown_text, "code": markdown_code}
    options = [] if config.model == BUNDLED else ["--model", config.model]
    command = shlex.join([*options, "--student", facts["source"]])
    template = environment.from_string((files("blade.distillation") / "student_card.md.jinja").read_text("utf-8"))
    stock, reason = stock_sampler(config, sampler, family.data.ddim_scheduler)
    return template.render(
        config=config,
        base_model=_hub_id(config.model),
        prompt="a red ball moving right" if config.model == BUNDLED else "A cat walks on the grass, realistic",
        command=f'blade-generate --prompt "..." {command}',
        attention=attention,
        grids=[[round(time, 2) for time in grid] for grid in sampler.config.grids],
        steps=" or ".join(str(count) for count in sampler.step_counts),
        stock=stock,
        reason=reason,
        noise_kept=sampler.config.noise_kept,
        **facts,
    )


def _hub_id(model: str) -> str | None:
    """Return a model's name if the Hub can have a model of that name, as its pages and its upload demand."""
    if model == BUNDLED or Path(model).exists():
        return None
    try:
        validate_repo_id(model)
    except HFValidationError:
        return None
    return model


def stock_sampler(
    config: DistillationConfig, sampler: FewStepScheduler, ddim_scheduler: str | None = None
) -> tuple[str | None, str | None]:
    """Return a Diffusers scheduler that is equivalent to the student's sampler in training.

    Args:
        config: the configuration of the training.
        sampler: the student's sampler.
        ddim_scheduler: class of Diffusers' deterministic sampler for the family's v-prediction models.

    Returns:
        A Python expression that makes it from the pipeline's scheduler, and None; or None, and the reason why there is
        none.
    """
    if config.trajectory.noise_kept < 1:
        return None, "every step renews a part of the noise, which no scheduler of Diffusers does at these times"
    if config.trajectory.times is not None:
        return None, "its times are its own, which no scheduler of Diffusers comes to"
    if len(sampler.step_counts) > 1:
        return None, "it is told how many steps there are, which stock Diffusers cannot"
    if sampler.config.prediction_type == "v_prediction":
        if ddim_scheduler is None:
            return None, "no scheduler of Diffusers is known to do the same for its family"
        return f'{ddim_scheduler}.from_config(pipe.scheduler.config, timestep_spacing="trailing")', None
    highest = max(sampler.config.grids[0]) / sampler.config.num_train_timesteps
    # solved for the shift s: the first level of noise is s u / (1 + (s - 1) u) at u = `SMALLEST`
    shift = highest * (1 - SMALLEST) / (SMALLEST * (1 - highest))
    options = 'prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=1'
    return f"DPMSolverMultistepScheduler({options}, flow_shift={shift:g})", None
