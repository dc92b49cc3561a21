"""Segmentation for `accelerate launch`; takes the arguments of `visionpeft segment`.

    accelerate launch --multi_gpu --num_processes 2 scripts/train_segmentation.py --data folder:camvid --decoder fpn

On CPUs write ACCELERATE_USE_CPU=true before it. The launcher's own --cpu starts a single process, whatever
--num_processes says (accelerate 1.15).
"""

import sys

from visionpeft.cli import main

if __name__ == "__main__":
    sys.exit(main(["segment", *sys.argv[1:]]))
