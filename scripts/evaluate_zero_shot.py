"""Zero-shot evaluation of CLIP models; takes the arguments of `visionpeft zero-shot`.

    python scripts/evaluate_zero_shot.py --model ViT-B-32 --checkpoint openai --data folder-all:birds
"""

import sys

from visionpeft.cli import main

if __name__ == "__main__":
    sys.exit(main(["zero-shot", *sys.argv[1:]]))
