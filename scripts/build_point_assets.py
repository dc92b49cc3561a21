"""Train assets/nano_point_mae.safetensors: masked auto-encoding of CAD parts (LDraw.org, CC BY 2.0) without labels.

    python scripts/build_point_assets.py --data ldraw_pretrain.npz

A killed run goes on where it was. At the end two linear probes on the made-up furniture are printed, one on the weights
and one on the random start, which no label of theirs has entered.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def probe(checkpoint: str | None, seed: int = 0) -> float:
    """Accuracy of logistic regression on the pooled features of the bundled clouds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from visionpeft.pipelines.points import NANO, CloudBackbone, Config, build, load_splits, plain_feed

    config = Config(model=NANO)
    model = build(CloudBackbone(NANO, checkpoint, config.backbone.groups), 8, pretrained=checkpoint is not None,
                  seed=seed).eval()
    features = {}
    for part in ("train_val", "test"):
        points = plain_feed(config, part).clouds[:, : config.seen]
        with torch.no_grad():
            features[part] = torch.cat([model.pool(model.forward_features(p)) for p in points.split(32)]).numpy()
    splits = load_splits(config)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    classifier.fit(features["train_val"], splits.train_val.labels)
    return float(classifier.score(features["test"], splits.test.labels))


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
        "bytes": target.stat().st_size,
    }
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
