"""Point clouds for `accelerate launch`; takes the arguments of `visionpeft points`.

    accelerate launch --multi_gpu --num_processes 2 scripts/train_point_cloud.py --method pointgst --epochs 2

On CPUs write ACCELERATE_USE_CPU=true before it.
"""

import sys

from visionpeft.cli import main

if __name__ == "__main__":
    sys.exit(main(["points", *sys.argv[1:]]))
