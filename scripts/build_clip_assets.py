"""Make the nano CLIP of `assets/`: its table of merges, and the text tower and projection trained on captions.

    python scripts/build_clip_assets.py bpe --flickr8k flickr8k
    python scripts/build_clip_assets.py train --cifar10 cifar10_jpeg.npz --flickr8k flickr8k

The image tower is `nano_vit` and stays as it is, so its features are computed once (kept in `--work`). Images: the
50,000 of CIFAR-10's training set, captioned with open_clip's 80 templates, and Flickr8k's photos but for the last 100.
Seeded; `train` prints the figures of the model card and reads each test set once, at the end.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from build_assets import load_cifar10, normalise
from safetensors.torch import save_file
from torch import Tensor, nn

from visionpeft.clip import nano
from visionpeft.clip.data import Pairs, read_pairs
from visionpeft.clip.scores import retrieval_scores
from visionpeft.clip.templates import fill, read_templates
from visionpeft.clip.text import encode_tokens, tokenize, zero_shot_weights
from visionpeft.models.nano import CLASSES

ASSETS = Path(__file__).resolve().parent.parent / "assets"
WARMUP = 100  # updates
HELD_OUT = 100  # photos for the retrieval figure


# Merges


def words(texts: list[str]) -> Counter[tuple[str, ...]]:
    """How often each word occurs, spelt in the symbols of open_clip's tokenizer."""
    from open_clip.tokenizer import SimpleTokenizer

    plain = SimpleTokenizer()
    found: Counter[tuple[str, ...]] = Counter()
    for text, count in Counter(texts).items():
        for token in plain.pat.findall(plain.clean_fn(text)):
            symbols = [plain.byte_encoder[b] for b in token.encode()]
            found[(*symbols[:-1], symbols[-1] + "</w>")] += count
    return found


def learn_merges(counts: Counter[tuple[str, ...]], total: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016): merge the most frequent pair, the first in order among equals."""
    spelling = dict(enumerate(counts))
    number = list(counts.values())
    merges: list[tuple[str, str]] = []
    while len(merges) < total:
        pairs: Counter[tuple[str, str]] = Counter()
        for i, word in spelling.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += number[i]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelling = {i: join(word, best) for i, word in spelling.items()}
    return merges


def join(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The word with every occurrence of the pair made one symbol."""
    out: list[str] = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


def write_merges(path: Path, merges: list[tuple[str, str]]) -> None:
    """In open_clip's format; no newline at the end, which would count as a merge."""
    text = "\n".join(["#version: visionpeft", *(" ".join(pair) for pair in merges)])
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def build_bpe(args: argparse.Namespace) -> None:
    pairs = read_pairs(Path(args.flickr8k) / "captions.txt", Path(args.flickr8k) / "images")
    texts = pairs.captions + [fill(t, name) for t in read_templates("openai") for name in CLASSES] * 5
    wanted = nano.config()["text_cfg"]["vocab_size"] - 2 * 256 - 2
    merges = learn_merges(words(texts), wanted)
    if len(merges) != wanted:
        raise SystemExit(f"only {len(merges)} merges of {wanted}: give more captions")
    write_merges(ASSETS / nano.MERGES, merges)


# Features


@torch.no_grad()
def pooled(model: Any, pixels: Tensor, batch: int = 256) -> Tensor:
    """What the projection is given: uint8 images (N, 3, 32, 32) -> (N, 192)."""
    model.eval()
    parts = []
    for x in pixels.split(batch):
        tokens = model.visual.transformer(model.visual._embeds(normalise(x)))
        parts.append(model.visual._pool(tokens)[0])
    return torch.cat(parts)


def photos(pairs: Pairs, side: int, views: int, seed: int) -> Tensor:
    """Random crops of the photos, uint8 (V, N, 3, side, side); one view is the centre crop."""
    from torchvision.transforms import v2

    torch.manual_seed(seed)
    if views == 1:
        crop = v2.Compose([v2.Resize(side, antialias=True), v2.CenterCrop(side)])
    else:
        crop = v2.Compose([v2.RandomResizedCrop(side, scale=(0.5, 1), antialias=True), v2.RandomHorizontalFlip()])
    images = [pairs.images[i][0] for i in range(len(pairs.images))]
    return torch.stack([torch.stack([v2.functional.pil_to_tensor(crop(im)) for im in images]) for _ in range(views)])


def features(args: argparse.Namespace, model: Any, cifar: dict[str, Tensor], pairs: Pairs) -> dict[str, Tensor]:
    """Pooled features of all training images, computed once."""
    file = Path(args.work) / "features.pt"
    if not file.exists():
        x = cifar["train_x"]
        shots = photos(pairs, x.shape[-1], args.views, args.seed)
        found = {
            "cifar": torch.stack([pooled(model, x), pooled(model, x.flip(-1))]),
            "photos": torch.stack([pooled(model, view) for view in shots]),
        }
        torch.save(found, file)
    return torch.load(file, weights_only=True)


# Training


def loss(images: Tensor, texts: Tensor, matches: Tensor, scale: Tensor) -> Tensor:
    """Contrastive loss where several images match a text: cross-entropy with equal shares, both ways."""
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).t()
    share = matches.float()
    up = -(share / share.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    used = share.sum(0) > 0
    down = -(share / share.sum(0).clamp_min(1) * logits.log_softmax(0)).sum(0)[used].mean()
    return (up + down) / 2


def train(args: argparse.Namespace, clip: Any, kept: dict[str, Tensor], labels: Tensor, pairs: Pairs) -> None:
    """Text tower and projection; a batch has images of CIFAR-10 with one text a class, and photos with a caption."""
    model, templates = clip.model, read_templates("openai")
    generator = torch.Generator().manual_seed(args.seed)
    learnt = [p for n, p in model.named_parameters() if not n.startswith("visual.") or n == "visual.proj"]
    optimiser = torch.optim.AdamW(learnt, lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / args.steps)) / 2
    )
    by_photo = [np.flatnonzero(pairs.owner == i) for i in range(len(pairs.images))]

    def draw(high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator)

    model.train()
    start, seen = time.monotonic(), 0.0
    for step in range(args.steps):
        rows = draw(len(labels), args.batch)
        some = torch.randperm(len(by_photo), generator=generator)[: args.photos]
        chosen = [int(by_photo[i][draw(len(by_photo[i]), 1)]) for i in some]
        names = [fill(templates[int(draw(len(templates), 1))], name) for name in CLASSES]
        texts = names + [pairs.captions[j] for j in chosen]
        x = torch.cat([kept["cifar"][draw(2, len(rows)), rows], kept["photos"][draw(args.views, len(some)), some]])
        group = torch.cat([labels[rows], len(CLASSES) + torch.arange(len(some))])
        text = encode_tokens(model, tokenize(clip.tokenizer, texts, model.context_length, cut=True))
        value = loss(x @ model.visual.proj, text, group[:, None] == torch.arange(len(texts)), model.logit_scale.exp())
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(100)))
        seen += float(value.detach())
        if (step + 1) % 100 == 0:
            print(f"{step + 1} of {args.steps}, loss {seen / 100:.3f}, {time.monotonic() - start:.0f} s", flush=True)
            seen = 0.0
    model.eval()


def build(args: argparse.Namespace) -> None:
    """Train, write assets/nano_clip.safetensors, print the figures of the card."""
    torch.manual_seed(args.seed)
    Path(args.work).mkdir(parents=True, exist_ok=True)
    cifar = load_cifar10(args.cifar10, Path(args.work))
    everything = read_pairs(Path(args.flickr8k) / "captions.txt", Path(args.flickr8k) / "images")
    order = np.arange(len(everything.images))
    pairs, held = everything.take(order[:-args.held_out]), everything.take(order[-args.held_out :])
    clip = nano.create(pretrained=False)
    clip.model.load_state_dict(nano.image_tower(), strict=False)
    nn.init.normal_(clip.model.visual.proj, std=clip.model.visual.proj.shape[0] ** -0.5)
    train(args, clip, features(args, clip.model, cifar, pairs), cifar["train_y"], pairs)
    save_file(nano.own_tensors(clip.model), Path(args.out) / nano.WEIGHTS)
    print(json.dumps(figures(nano.create(str(Path(args.out) / nano.WEIGHTS)), cifar, held), indent=2))


@torch.no_grad()
def figures(clip: Any, cifar: dict[str, Tensor], held: Pairs) -> dict[str, float]:
    """CIFAR-10's test images prompted (its classes were seen in training), and retrieval on held-out photos."""
    model = clip.model
    x = F.normalize(pooled(model, cifar["test_x"]) @ model.visual.proj, dim=-1)
    w = zero_shot_weights(model, clip.tokenizer, CLASSES, read_templates("openai"))
    photo = pooled(model, photos(held, cifar["test_x"].shape[-1], 1, 0)[0]) @ model.visual.proj
    ids = tokenize(clip.tokenizer, held.captions, model.context_length, cut=True)
    text = F.normalize(encode_tokens(model, ids), dim=-1)
    scores = retrieval_scores(F.normalize(photo, dim=-1), text, torch.from_numpy(held.owner))
    return {
        "cifar10_prompted_accuracy": float(((x @ w).argmax(1) == cifar["test_y"]).float().mean()),
        **scores,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    bpe = jobs.add_parser("bpe", help="write assets/nano_clip_bpe.txt.gz")
    bpe.add_argument("--flickr8k", required=True, help="folder with captions.txt and images")
    job = jobs.add_parser("train", help="write assets/nano_clip.safetensors")
    job.add_argument("--cifar10", help="npz of JPEG bytes; without it torchvision downloads the set")
    job.add_argument("--flickr8k", required=True, help="folder with captions.txt and images")
    job.add_argument("--work", default="runs/nano_clip", help="features")
    job.add_argument("--out", default=str(ASSETS))
    job.add_argument("--steps", type=int, default=3000)
    job.add_argument("--batch", type=int, default=256, help="images of CIFAR-10 in a batch")
    job.add_argument("--photos", type=int, default=64, help="photos in a batch")
    job.add_argument("--views", type=int, default=10, help="random crops of each photo")
    job.add_argument("--held-out", type=int, default=HELD_OUT, help="photos for the retrieval figure")
    job.add_argument("--lr", type=float, default=1e-3)
    job.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    {"bpe": build_bpe, "train": build}[args.job](args)


if __name__ == "__main__":
    main()
