"""Stand-ins for the tiny random models on the Hub that Diffusers' own tests load: the same classes, other numbers.

They make those tests run where the Hub cannot be reached. What a test computes differs from what it does with the
Hub's files; with BLADE and without it is compared on the same stand-ins.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from blade.common.files import write_files

COMMIT = "0" * 40
"""Name of the only revision."""

TOKENS = 1000
"""Most tokens of a text encoder of the tests: those of a vocabulary smaller than this are all below it."""


def write_stand_ins(cache: Path) -> list[str]:
    """Write the stand-ins into a folder that is laid out as the Hub's cache, and return their ids."""
    for source, make in STAND_INS.items():
        home = cache / f"models--{source.replace('/', '--')}"
        with TemporaryDirectory() as made:
            make(Path(made))
            files = {
                home / "snapshots" / COMMIT / path.relative_to(made): path.read_bytes()
                for path in Path(made).rglob("*")
                if path.is_file()
            }
        write_files({**files, home / "refs" / "main": COMMIT.encode()})
    return list(STAND_INS)


def _write_tokenizer(folder: Path, kind: str, specials: tuple[str, ...], **options: Any) -> None:
    """Write a tokenizer of single letters, whose first tokens are `specials`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    letters = [*string.printable]
    names = [*specials, *(letter for letter in letters if letter not in specials)]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=options["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.add_special_tokens(list(specials))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": kind, "model_max_length": 512, **options}
    write_files({folder / "tokenizer_config.json": json.dumps(config).encode()})


def _make_t5(folder: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4, dropout_rate=0.0)
    T5EncoderModel(config).save_pretrained(folder)
    specials = ("<pad>", "</s>", "<unk>")
    _write_tokenizer(
        folder, "PreTrainedTokenizerFast", specials, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def _make_clip(folder: Path) -> None:
    _write_clip_model(folder, width=32)
    _write_clip_tokenizer(folder)


def _write_clip_model(folder: Path, width: int) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=TOKENS, hidden_size=width, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder)


def _write_clip_tokenizer(folder: Path) -> None:
    specials = ("<|startoftext|>", "<|pad|>", "<|endoftext|>")
    _write_tokenizer(
        folder, "PreTrainedTokenizerFast", specials, bos_token=specials[0], pad_token=specials[1],
        eos_token=specials[2], unk_token=specials[2],
    )  # fmt: skip


def _write_llama_tokenizer(folder: Path) -> None:
    specials = ("<s>", "<pad>", "</s>", "<unk>")
    _write_tokenizer(
        folder, "PreTrainedTokenizerFast", specials, bos_token="<s>", pad_token="<pad>",
        eos_token="</s>", unk_token="<unk>", padding_side="right",
    )  # fmt: skip


def _make_hunyuan_video_tokenizer(folder: Path) -> None:
    _write_llama_tokenizer(folder / "tokenizer")


def _make_hunyuan_video(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=16, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaModel(config).save_pretrained(folder / "text_encoder")
    _write_clip_model(folder / "text_encoder_2", width=8)
    _write_llama_tokenizer(folder / "tokenizer")
    _write_clip_tokenizer(folder / "tokenizer_2")


def _make_qwen_tokenizer(folder: Path) -> None:
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    _write_tokenizer(
        folder, "PreTrainedTokenizerFast", specials, pad_token=specials[0], eos_token=specials[2],
        unk_token=specials[0],
    )  # fmt: skip


def _make_siglip(folder: Path) -> None:
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=30, patch_size=2
    )
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 30, "width": 30}).save_pretrained(folder)


def _make_gemma(folder: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    specials = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<image_soft_token>", "<end_of_turn>")
    _write_tokenizer(
        folder, "PreTrainedTokenizerFast", specials, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>",
    )  # fmt: skip


STAND_INS: dict[str, Callable[[Path], None]] = {
    "hf-internal-testing/tiny-random-t5": _make_t5,
    "hf-internal-testing/tiny-random-clip": _make_clip,
    "hf-internal-testing/tiny-random-hunyuanvideo": _make_hunyuan_video,
    "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration": _make_qwen_tokenizer,
    "hf-internal-testing/tiny-random-SiglipVisionModel": _make_siglip,
    "finetrainers/dummy-hunyaunvideo": _make_hunyuan_video_tokenizer,
    "hf-internal-testing/tiny-gemma3": _make_gemma,
}
"""Functions that make each, by its id."""
