"""Run by two processes at once: gradients under DDP and `fully_shard` are those of one process with both batches."""

import os
import sys

from accelerate import PartialState
from test_roles import FAKE, STUDENT, gradients, make_roles

from blade.distillation.parallel import Processes, unsharded
from blade.families.registry import find_family


def main(make_wan, wan_inputs):
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    assert Processes(state, "ddp").mean([state.process_index, 0.25]) == [0.5, 0.25]
    # in float64, so that rounding, which differs from one processor to another, is far below the bound
    both = {name: value.double() for name, value in wan_inputs(batch=2).items()}
    own = {name: value[state.process_index : state.process_index + 1] for name, value in both.items()}
    for role, other in ((STUDENT, FAKE), (FAKE, STUDENT)):
        expected = gradients(make_roles(make_wan().double()), role, both, detour=False)
        for parallel in ("ddp", "fsdp"):
            for checkpointing in (False, True):
                roles = make_roles(make_wan().double(), checkpointing=checkpointing)
                processes = Processes(state, parallel)
                processes.wrap(roles.distinct(), find_family(roles.transformer(role)))
                found = unsharded(gradients(roles, role, own, detour=True))
                where = f"{role}, {parallel}, checkpointing {checkpointing}"
                for name, gradient in expected.items():
                    error = float((found[name] - gradient).abs().max() / gradient.abs().max())
                    assert error < 1e-5, f"{where}: {name} differs by {error}"
                assert all(one.grad is None for one in roles.named_parameters(other).values()), where
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import conftest

    main(conftest.make_wan.__wrapped__(), conftest.wan_inputs.__wrapped__())
    # all has been asserted; the threads of PyTorch's process groups now and then abort an ordinary exit
    sys.stdout.flush()
    os._exit(0)
