"""A module that gets equal inputs again is run once, and its operations and memory counted every time."""

import pytest
import torch
from torch import nn

from blade.generation.plan import peak_bytes
from blade.models.costs import count_flops


class Tiled(nn.Module):
    """Decodes tiles one by one, and keeps what is decoded."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 32))

    def decode(self, latent, tile):
        return torch.cat([self.decoder(part) for part in latent.split(tile)])


@pytest.mark.parametrize("tile", [8, 7])
def test_counts_are_those_of_all_calls(tile):
    with torch.device("meta"):
        model, latent = Tiled(), torch.empty(32, 64)
    decode = lambda: model.decode(latent, tile)  # noqa: E731
    flops, memory = count_flops(decode), peak_bytes(decode)
    forward = model.decoder.forward
    assert (count_flops(decode, model.decoder), peak_bytes(decode, model.decoder)) == (flops, memory)
    assert model.decoder.forward == forward
    assert flops == 32 * 2 * (64 * 256 + 256 * 32)


def test_each_shape_is_run_once():
    with torch.device("meta"):
        model, latent = Tiled(), torch.empty(32, 64)
    layer, seen = model.decoder[0], []
    layer.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[0]))
    count_flops(lambda: model.decode(latent, 7), model.decoder)
    assert seen == [7, 4]


def test_calls_with_more_arguments_run_as_always():
    class Stateful(nn.Linear):
        def forward(self, x, state=None):
            state.append(len(state))
            return super().forward(x)

    with torch.device("meta"):
        module, x = Stateful(4, 4), torch.empty(2, 4)
    state = []
    assert count_flops(lambda: [module(x, state=state) for _ in range(3)], module) == 3 * 2 * 2 * 16
    assert state == [0, 1, 2]
