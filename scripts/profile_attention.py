"""`blade-profile` with accelerate: prompts are distributed over the processes, one GPU each.

    accelerate launch --num_processes 4 scripts/profile_attention.py --prompts prompts.txt --target-density 0.35

The options are those of `blade-profile`.
"""

from blade.cli.profile import main

if __name__ == "__main__":
    main()
