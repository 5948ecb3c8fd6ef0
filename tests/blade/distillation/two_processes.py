"""Run by two processes at once: gradients under DDP and `fully_shard` are those of one process with both batches.

The processes have a batch each, or share both as one group.
"""

import itertools
import os
import sys

from accelerate import PartialState
from test_roles import FAKE, STUDENT, gradients, make_roles

from blade.distillation.parallel import Processes, unsharded
from blade.families.registry import find_family
from blade.models.parallel import split_transformer

GRID = (3, 5, 7)  # 105 tokens, an odd number
CASES = (
    *itertools.product(("wan",), (STUDENT, FAKE), (1,), (False, True)),
    ("wan", STUDENT, 2, False),
    ("wan", STUDENT, 2, True),
    ("wan", FAKE, 2, True),
    ("cogvideox", STUDENT, 2, True),  # whose text is split too
)
"""Model, role, processes that share a sample, and whether blocks are recomputed."""


def main(families):
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    assert Processes(state, "ddp").mean([state.process_index, 0.25]) == [0.5, 0.25]
    every = {
        (parallel, size): Processes(state, parallel, None, size) for parallel in ("ddp", "fsdp") for size in (1, 2)
    }
    for name, role, size, checkpointing in CASES:
        other, family = FAKE if role == STUDENT else STUDENT, families[name]
        # in float64, so that rounding, which differs from one processor to another, is far below the bound
        both = {key: as_double(value) for key, value in family.inputs(GRID, batch=2).items()}
        index = state.process_index
        inputs = both if size == 2 else {key: value[index : index + 1] for key, value in both.items()}
        expected = gradients(make_roles(family.make().double()), role, both, detour=False)
        for parallel in ("ddp", "fsdp"):
            processes, roles = every[parallel, size], make_roles(family.make().double(), checkpointing=checkpointing)
            transformer = roles.transformer(role)
            if size == 2:
                split_transformer(transformer, processes.mesh)
            processes.wrap(roles.distinct(), find_family(transformer))
            found = unsharded(gradients(roles, role, inputs, detour=True, backward=processes.backward))
            where = f"{name}, {role}, {parallel}, groups of {size}, checkpointing {checkpointing}"
            for key, gradient in expected.items():
                error = float((found[key] - gradient).abs().max() / gradient.abs().max())
                assert error < 1e-5, f"{where}: {key} differs by {error}"
            assert all(one.grad is None for one in roles.named_parameters(other).values()), where
    state.wait_for_everyone()
    state.destroy_process_group()


def as_double(value):
    if isinstance(value, tuple):
        return tuple(map(as_double, value))
    return value.double() if value.is_floating_point() else value


if __name__ == "__main__":
    sys.path[:0] = sys.argv[1:]
    from small_families import FAMILIES

    main({name: FAMILIES[name](name) for name in ("wan", "cogvideox")})
    # all has been asserted; the threads of PyTorch's process groups now and then abort an ordinary exit
    sys.stdout.flush()
    os._exit(0)
