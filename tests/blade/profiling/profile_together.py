"""Run by several processes at once: profiles of a small pipeline whose videos they make together.

Takes the pipeline's folder, one for the results, and names of requests.
"""

import os
import sys
from pathlib import Path

from ranks import join_ranks, leave_ranks

from blade.models.parallel import Team
from blade.profiling.assignment import GreedyRule
from blade.profiling.objectives import Budget
from blade.profiling.team import follow
from blade.profiling.workflow import ProfileRequest, profile_attention

QUICK = {"influence_prompts": 0, "verify_prompts": 0}
OPTIONS = {
    "budgeted": {},
    "resumed": QUICK,
    # no target density, whose threshold is the loss of a head, so that rounding decides about that
    "published": {**QUICK, "method": "published", "budget": None, "rule": GreedyRule(threshold=0.14)},
}


def request_of(name, model, folder):
    """A request for a profile of the small pipeline, by its name."""
    generation = {
        "model": str(model),
        "steps": 2,
        "guidance_scale": 2.0,
        "height": 64,
        "width": 64,
        "frames": 9,
        "device": "cpu",
    }
    given = {"budget": Budget(target_density=0.6), "sampled_blocks": None, **OPTIONS[name]}
    return ProfileRequest.of(generation, prompts=("a red ball",), output=Path(folder) / name, **given)


def main(model, folder, names):
    _, count = join_ranks()
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # which accelerate looks for, and does not use
    for name in names:
        team = Team(count, "cpu")
        if team.is_first:
            profile_attention(request_of(name, model, folder), team=team)
            team.tell(None)
        else:
            follow(team)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
    leave_ranks()
