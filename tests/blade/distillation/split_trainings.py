"""Run by several processes at once: trainings of a JSON file, one after another, some of them with a planted fault."""

import json
import os
import sys
from pathlib import Path
from unittest import mock

from accelerate import PartialState

from blade.distillation.draws import Draws
from blade.distillation.parallel import Processes
from blade.distillation.recipes import load_config
from blade.distillation.workflow import distill


def own_noise(plain=Draws.noise):
    """Noise that every process draws by itself."""

    def noise(self, stream, samples, shape, *key):
        return plain(self, stream, samples, shape, *key, PartialState().process_index)

    return mock.patch.object(Draws, "noise", noise)


def gradients_averaged():
    """Gradients that are averaged over a group instead of summed."""
    return mock.patch.object(Processes, "backward", lambda self, loss: loss.backward())


FAULTS = {"own noise": own_noise, "gradients averaged": gradients_averaged}


def main(path):
    for run in json.loads(path.read_text(encoding="utf-8")):
        config = load_config("shapes", run["settings"])
        if run["fault"] is None:
            report = distill(config, dry_run=run.get("dry_run", False))
            if PartialState().is_main_process:
                print(report)
        else:
            with FAULTS[run["fault"]]():
                distill(config)
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # all is written; the threads of PyTorch's process groups now and then abort an ordinary exit
    sys.stdout.flush()
    os._exit(0)
