"""Personalisation for `accelerate launch`; takes the arguments of `visionpeft personalise`.

    accelerate launch --multi_gpu --num_processes 2 scripts/train_personalisation.py --base sd --images cat \
        --accumulation 2

The processes share the micro-batches of an update: `--accumulation` must be a multiple of their number.
"""

import sys

from visionpeft.cli import main

if __name__ == "__main__":
    sys.exit(main(["personalise", *sys.argv[1:]]))
