"""Train assets/nano_point_mae.safetensors: masked auto-encoding of CAD parts (LDraw.org, CC BY 2.0) without labels.

    python scripts/build_point_assets.py --data ldraw_pretrain.npz

A killed run goes on where it was. At the end linear probes on the made-up furniture, of which nothing entered the
weights, are measured on the weights and on the random start; they go into the card, assets/nano_point_mae.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def regressed(features: Callable[[str], np.ndarray]) -> float:
    """Test accuracy of logistic regression on features [N, F] of "train_val" and "test" of the bundled clouds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from visionpeft.pipelines.points import Config, load_splits

    splits, classifier = load_splits(Config()), make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    classifier.fit(features("train_val"), splits.train_val.labels)
    return float(classifier.score(features("test"), splits.test.labels))


def clouds(part: str) -> torch.Tensor:
    """Points [N, P, 3] of a part of the bundled clouds, as evaluation sees them."""
    from visionpeft.pipelines.points import Config, plain_feed

    return plain_feed(Config(), part).clouds[:, : Config().seen]


def probe(checkpoint: str | None) -> float:
    """The same on the pooled features of weights, or of the random start."""
    from visionpeft.pipelines.points import NANO, CloudBackbone, Config, build

    backbone = CloudBackbone(NANO, checkpoint, Config().backbone.groups)
    model: Any = build(backbone, 8, pretrained=checkpoint is not None).eval()

    @torch.no_grad()
    def features(part: str) -> np.ndarray:
        return torch.cat([model.pool(model.forward_features(p)) for p in clouds(part).split(32)]).numpy()

    return regressed(features)


def by_hand() -> float:
    """The same on features that need no network."""
    from visionpeft.pipelines.points import features_by_hand

    return regressed(lambda part: features_by_hand(clouds(part).numpy()))


CARD = """# nano_point_mae.safetensors

The encoder of a small Point-MAE, for demos and tests. Not a model to build products on.

| what | value |
|---|---|
| made by | `visionpeft.models.point_transformer.create("nano_point_mae", num_classes, path)` |
| input | clouds of 1,024 points, centred and within the unit sphere; 32 groups of 16 points |
| width, depth, heads | 128, 6, 4 |
| bytes | {bytes:,} (fp16) |
| loss (Chamfer-L2 within groups), first and last epoch | {loss_first_epoch:.5f}, {loss_last_epoch:.5f} |
| linear probe, % | {probe:.1f} |
| linear probe of the random start, % | {random:.1f} |
| the same regression on 48 features by hand, % | {by_hand:.1f} |

The probes are logistic regression (C = 0.1 on standardised features) on the {classes} classes of the bundled made-up
furniture: {train} clouds to train, {test} to test. Nothing of it entered the weights, and nothing was chosen on its
test clouds.

## Data

4,000 CAD parts of the LDraw Parts Library, 1,024 points from the surface of each, without labels. The library is the
work of its authors, LDraw.org, CC BY 2.0 (https://creativecommons.org/licenses/by/2.0/); changed here: points were
sampled from the meshes, centred, scaled and stored as 16-bit integers. Neither is part of this package.

## Training

Masked auto-encoding as in Point-MAE (arXiv 2203.06604): 60 % of the groups left out, a decoder of four blocks, AdamW
1e-3, weight decay 0.05, {epochs} epochs of batches of {batch}, cosine with 10 epochs of warm-up, clouds scaled and
shifted.

    python scripts/build_point_assets.py --data ldraw_pretrain.npz --epochs {epochs} --batch {batch}
"""


def write_card(target: Path, figures: dict[str, float], epochs: int, batch: int) -> None:
    from visionpeft.pipelines.points import Config, load_splits

    splits = load_splits(Config())
    target.with_suffix(".md").write_text(CARD.format(
        **figures, probe=100 * figures["probe_accuracy"], random=100 * figures["probe_accuracy_random"],
        by_hand=100 * figures["by_hand_accuracy"], classes=len(splits.classes), train=len(splits.train_val),
        test=len(splits.test), epochs=epochs, batch=batch))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="npz with points [clouds, points, 3]")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--work", default="runs/nano_point_mae", help="checkpoints and weights")
    parser.add_argument("--assets", default=str(ASSETS), help="folder for the finished file")
    args = parser.parse_args()
    from visionpeft.pipelines.point_pretraining import Config, run

    def progress(done: int, steps: int, loss: float) -> None:
        if done % 50 == 0 or done == steps:
            print(f"update {done}/{steps}, loss {loss:.5f}", flush=True)

    path, history = run(Config(args.data, epochs=args.epochs, batch_size=args.batch, out=args.work), progress)
    target = Path(args.assets) / path.name
    shutil.copyfile(path, target)
    figures = {
        "loss_first_epoch": history.rows[0]["train_loss"],
        "loss_last_epoch": history.rows[-1]["train_loss"],
        "probe_accuracy": probe(str(target)),
        "probe_accuracy_random": probe(None),
        "by_hand_accuracy": by_hand(),
        "bytes": target.stat().st_size,
    }
    write_card(target, figures, args.epochs, args.batch)
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
