"""`blade-distill` with accelerate, on one or more GPUs or machines.

    accelerate launch --num_processes 8 scripts/distill.py wan2.1-t2v-1.3b prompts=prompts.txt

The arguments are those of `blade-distill`.
"""

from blade.cli.distill import main

if __name__ == "__main__":
    main()
