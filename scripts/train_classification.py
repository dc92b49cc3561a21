"""Classification for `accelerate launch`; takes the arguments of `visionpeft classify`.

accelerate launch --num_processes 2 --cpu scripts/train_classification.py --method lora --epochs 2
"""

import sys

from visionpeft.cli import main

if __name__ == "__main__":
    sys.exit(main(["classify", *sys.argv[1:]]))
