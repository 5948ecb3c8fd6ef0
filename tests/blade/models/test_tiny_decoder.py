"""Tiny decoders: equal to the published graph, in chunks as whole, and refused where they do not fit."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from taehv_weights import base_weights, decode_plainly, super_weights

from blade.families.registry import model_families
from blade.generation.plan import peak_bytes
from blade.models.decoder_weights import decoder_dtype, find_decoder_weights, load_tiny_decoder, read_tiny_decoder
from blade.models.loading import load_empty_model
from blade.models.source import ModelError
from blade.models.tiny_decoder import TinyDecoder, TinyDecoderLayout, layout_of, make_tiny_decoder

WHAT = "`decoder_weights` x"


def draw_latents(channels: int, frames: int, height: int = 2, width: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(channels + frames)
    return 2 * torch.randn(channels, frames, height, width, generator=generator)


@pytest.mark.parametrize(
    ("weights", "channels", "scale", "frames"),
    [
        (base_weights(), 16, 8, 3),
        (base_weights(48, 2, seed=1), 48, 16, 2),
        (base_weights(32, 2, seed=2), 32, 16, 1),
        (super_weights(seed=3), 48, 16, 2),
    ],
    ids=["16", "48", "32, one frame", "48, super"],
)
def test_it_computes_the_published_graph(weights, channels, scale, frames) -> None:
    decoder, latents = make_tiny_decoder(weights, WHAT), draw_latents(channels, frames)
    expected = decode_plainly(weights, latents)
    video = decoder.decode(latents)
    assert video.shape == expected.shape == (1 + 4 * (frames - 1), 3, 2 * scale, 3 * scale)
    assert video.dtype == torch.float32 and video.min() >= 0 and video.max() <= 1
    assert 0.1 < video.std() < 0.6  # not clamped away
    torch.testing.assert_close(video.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 99])
def test_chunks_are_the_whole(chunk: int) -> None:
    weights = base_weights(4)
    decoder, latents = make_tiny_decoder(weights, WHAT), draw_latents(4, 7)
    whole = decoder.decode(latents, chunk=7)
    assert whole.shape[0] == 25
    torch.testing.assert_close(decoder.decode(latents, chunk=chunk), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.double(), decode_plainly(weights, latents), rtol=0, atol=2e-5)


def test_a_frame_sees_only_what_came_before() -> None:
    decoder, latents = make_tiny_decoder(base_weights(4), WHAT), draw_latents(4, 4)
    video = decoder.decode(latents)
    latents[:, 2:] = 0
    changed = decoder.decode(latents)
    assert torch.equal(video[:5], changed[:5]) and not torch.allclose(video[5:9], changed[5:9])


def test_videos_of_a_batch_do_not_mix() -> None:
    decoder = make_tiny_decoder(base_weights(4), WHAT)
    latents = torch.stack((draw_latents(4, 3), -draw_latents(4, 3)))
    for chunk in (1, 3):
        both = torch.cat([*decoder.stream(latents, chunk)], dim=1)
        for video, own in zip(both, latents, strict=True):
            torch.testing.assert_close(video, decoder.decode(own), rtol=0, atol=1e-5)


def test_memory_does_not_grow_with_the_length() -> None:
    with torch.device("meta"):
        decoder = TinyDecoder(TinyDecoderLayout(latent_channels=16))

    def peak(frames: int, chunk: int) -> int:
        latents = torch.zeros(1, 16, frames, 30, 52, device="meta")
        return peak_bytes(lambda: [None for _ in decoder.stream(latents, chunk)])

    assert peak(3, 1) == peak(4, 1) == peak(21, 1) < peak(21, 3) < peak(21, 21)


def test_bad_calls_are_named() -> None:
    decoder = make_tiny_decoder(base_weights(4), WHAT)
    with pytest.raises(ValueError, match=r"`latents` must be \(B, 4, F, h, w\), got shape \(1, 5, 2, 2, 3\)"):
        decoder.decode(draw_latents(5, 2))
    with pytest.raises(ValueError, match=r"`latents` must be \(channels, F, h, w\), got shape \(4, 2, 3\)"):
        decoder.decode(draw_latents(4, 2)[:, 0])
    with pytest.raises(ValueError, match="`chunk` must be at least 1, got 0"):
        decoder.decode(draw_latents(4, 2), chunk=0)


def test_sizes_are_read_off_the_weights() -> None:
    def layout(weights):
        return layout_of({key: tuple(value.shape) for key, value in weights.items()}, WHAT)

    assert layout(base_weights(16)) == TinyDecoderLayout(latent_channels=16)
    found = layout(super_weights())
    assert found == TinyDecoderLayout(latent_channels=48, patch=2, variant="super")
    assert found.time_scale == 4 and found.space_scale == 16 and found.frame_count(21) == 81
    longer = base_weights(128, 4)
    longer["decoder.7.conv.weight"] = torch.zeros(512, 256, 1, 1)
    assert layout(longer) == TinyDecoderLayout(latent_channels=128, patch=4, time_scales=(2, 2, 2))
    assert layout(longer).time_scale == 8


def spoilt(key: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    weights = base_weights()
    weights.pop(key, None)
    return weights if value is None else weights | {key: value}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"conv.weight": torch.zeros(1)}, r"lacks decoder\.1\.weight, .* its first keys: conv\.weight"),
        ({}, r"lacks decoder\.1\.weight, .* its first keys: none"),
        (spoilt("decoder.1.weight", torch.zeros(256, 16)), r"decoder\.1\.weight of shape \(256, 16\), .* four axes"),
        (
            spoilt("decoder.1.weight", torch.zeros(128, 16, 3, 3)),
            r"decoder\.1\.weight of shape \(128, 16, 3, 3\), which must be \(256, 16, 3, 3\) in a tiny decoder of 16",
        ),
        (spoilt("decoder.10.conv.2.bias", None), r"lacks decoder\.10\.conv\.2\.bias, which must be \(128,\)"),
        (
            spoilt("decoder.22.weight", torch.zeros(6, 64, 3, 3)),
            "of 6 output channels, which must be one of 3, 12, 48",
        ),
        (spoilt("decoder.7.conv.weight", torch.zeros(300, 256, 1, 1)), "300 output channels, .* one of 256, 512"),
        (spoilt("decoder.9.skip.weight", torch.zeros(1)), r"has the key decoder\.9\.skip\.weight, which a tiny"),
        (spoilt("extra", torch.zeros(1)), "has the key extra"),
        (
            spoilt("decoder.1.bias", torch.zeros(256, dtype=torch.int8)),
            r"decoder\.1\.bias in int8, which must be float",
        ),
        (spoilt("decoder.1.bias", torch.full((256,), torch.nan)), r"decoder\.1\.bias that are infinite or not num"),
    ],
)
def test_wrong_weights_are_named(weights, message: str) -> None:
    with pytest.raises(ModelError, match=f"^`decoder_weights` x .*{message}"):
        make_tiny_decoder(weights, WHAT)


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_both_kinds_of_files_are_read(ending: str, tmp_path: Path) -> None:
    path, weights = tmp_path / f"taew2_1{ending}", {key: value.half() for key, value in base_weights().items()}
    if ending == ".pth":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    decoder = read_tiny_decoder(find_decoder_weights(str(path)), WHAT)
    assert torch.equal(decoder.state_dict()["decoder.22.weight"], weights["decoder.22.weight"].float())
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=rf"^{WHAT} cannot be read: "):
        read_tiny_decoder(path, WHAT)


class Hostile:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "taew2_1.pth", tmp_path / "trace"
    torch.save({**base_weights(), "decoder.1.bias": Hostile(trace)}, path)
    with pytest.raises(ModelError, match=r"it is damaged, or holds more than tensors, which could run code") as raised:
        read_tiny_decoder(path, WHAT)
    path.write_bytes(pickle.dumps(Hostile(trace)))
    with pytest.raises(ModelError, match="holds more than tensors"):
        read_tiny_decoder(path, WHAT)
    assert not trace.exists() and "weights_only" not in str(raised.value)
    torch.save({"state_dict": base_weights()}, path)
    with pytest.raises(ModelError, match="must hold tensors by their keys, got a dict as 'state_dict'"):
        read_tiny_decoder(path, WHAT)
    torch.save(torch.zeros(1), path)
    with pytest.raises(ModelError, match="must hold tensors by their keys, got a Tensor"):
        read_tiny_decoder(path, WHAT)


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taew2_1.bin").touch()
    for source, message in (
        (str(tmp_path / "taew2_1.bin"), r"must be a file that ends in \.safetensors, \.pth or \.pt"),
        (str(tmp_path), "must be a file or a Hub id, got the folder"),
        ("taew2_1.safetensors", "there is no file taew2_1.safetensors"),
        ("weights/taew2_1.pth", "there is no file weights/taew2_1.pth"),
        (str(tmp_path / "no.pth"), "there is no file"),
    ):
        with pytest.raises(ModelError, match=message):
            find_decoder_weights(source)
    big = tmp_path / "taew2_1.pth"
    big.touch()
    monkeypatch.setattr("blade.models.decoder_weights.MOST_BYTES", -1)
    with pytest.raises(ModelError, match="of at most -1 bytes, got 0"):
        read_tiny_decoder(big, WHAT)


def test_the_file_of_a_repository_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Info:
        siblings: list

    asked, files = [], Info()

    class Entry:
        def __init__(self, name: str) -> None:
            self.rfilename = name

    def download(name: str, file: str, local_files_only: bool) -> str:
        asked.append((name, file))
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("blade.models.decoder_weights.repository_info", lambda name, option, file: files)
    files.siblings = [Entry("README.md"), Entry("taew2_1.pth"), Entry("taew2_1.safetensors")]
    assert find_decoder_weights("me/tiny").name == "taew2_1.safetensors"
    assert find_decoder_weights("me/tiny/taew2_1.pth").name == "taew2_1.pth"
    with pytest.raises(ModelError, match=r"me/tiny has no file of weights taew2_2\.pth; did you mean taew2_1"):
        find_decoder_weights("me/tiny/taew2_2.pth")
    files.siblings = [Entry("a.pth"), Entry("b.pth")]
    with pytest.raises(ModelError, match=r"the file be named as me/tiny/FILE; it has a\.pth, b\.pth"):
        find_decoder_weights("me/tiny")
    files.siblings = []
    with pytest.raises(ModelError, match="it has none"):
        find_decoder_weights("me/tiny")
    files.siblings = [Entry("a.pth")]
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    with pytest.raises(ModelError, match="`decoder_weights` me/tiny cannot be downloaded: "):
        find_decoder_weights("me/tiny")
    assert asked == [("me/tiny", "taew2_1.safetensors"), ("me/tiny", "taew2_1.pth")]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, str]:
    """Random weights under published names."""
    folder, paths = tmp_path_factory.mktemp("weights"), {}
    for name, weights in (("taew2_1", base_weights()), ("taehv", base_weights()), ("taew2_2", base_weights(48, 2))):
        save_file(weights, folder / f"{name}.safetensors")
        paths[name] = str(folder / f"{name}.safetensors")
    return paths


def test_it_must_fit_the_latents(published, caplog: pytest.LogCaptureFixture) -> None:
    model = load_empty_model("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert load_tiny_decoder(model, published["taew2_1"]).layout.latent_channels == 16
    assert not [record for record in caplog.records if record.name.startswith("blade")]
    load_tiny_decoder(model, published["taehv"])
    assert "has the shape of this model's latents but another name than taew2_1" in caplog.text
    message = (
        r"must fit the latents of this model, 16 channels, 8 x 8 pixels and 4 frames each, got a decoder of 48 "
        r"channels, 16 x 16 pixels and 4 frames each; take taew2_1\."
    )
    with pytest.raises(ValueError, match=message):
        load_tiny_decoder(model, published["taew2_2"])


def test_the_bundled_model_has_none(published) -> None:
    with pytest.raises(ValueError, match=r"this model, 32 channels, 8 x 8 .* no tiny decoder is published for it"):
        load_tiny_decoder(load_empty_model(), published["taew2_1"])


@pytest.mark.parametrize("name", ["LTXPipeline", "CogVideoXPipeline"])
def test_a_family_without_one_says_which_have(name: str, configurations, published) -> None:
    model = load_empty_model(configurations(name))
    with pytest.raises(
        ValueError, match=r'`decoder` must be "full" for this model: .*: taehv; .* taew2_1, taew2'
    ) as raised:
        load_tiny_decoder(model, published["taew2_1"])
    assert model.family.name in str(raised.value)


def test_every_published_name_is_of_one_size() -> None:
    for family in model_families():
        for channels, names in family.tiny_decoders.items():
            assert channels in (16, 32, 48) and names, family.name


def test_it_runs_in_float16_beside_a_model_in_16_bits() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert decoder_dtype(torch.bfloat16, cuda) == torch.float16
    assert decoder_dtype(torch.float32, cuda) == decoder_dtype(torch.bfloat16, cpu) == torch.float32
