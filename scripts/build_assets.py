"""Make what `assets/` ships: the nano ViT with its CIFAR-10 head, and a small balanced piece of Fashion-MNIST.

    python scripts/build_assets.py fashion --source /usr/share/datasets/fashion-mnist
    python scripts/build_assets.py nano --cifar10 cifar10_jpeg.npz --vit vit_small_patch14_dinov2.safetensors \
        --convnet efficientnet-lite0-57934424.pth

Both are seeded. `nano` keeps its teacher targets and a checkpoint per epoch in `--work` and goes on from there.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from slim_vit import Slim
from torch import Tensor, nn

ASSETS = Path(__file__).resolve().parent.parent / "assets"
VIT, CONVNET = "vit_small_patch14_dinov2", "tf_efficientnet_lite0"
DROP = (0.5,) * 2 + (0.75,) * 7 + (0.5,) * 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# CIFAR-10


def load_cifar10(path: str | None, work: Path) -> dict[str, Tensor]:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N], as train_x, train_y, test_x, test_y; decoded once to `work`."""
    cache = work / "cifar10.pt"
    if not cache.exists():
        arrays = {}
        for split in ("train", "test"):
            images, labels = _jpeg_split(path, split) if path else _torchvision_split(work, split)
            arrays[f"{split}_x"] = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
            arrays[f"{split}_y"] = torch.from_numpy(labels.astype(np.int64))
        torch.save(arrays, cache)
    return torch.load(cache, weights_only=True)


def _jpeg_split(path: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    with np.load(path) as file:
        data, offset, labels = (file[f"{split}_{key}"] for key in ("bytes", "off", "y"))
    pairs = zip(offset[:-1], offset[1:], strict=True)
    images = [np.asarray(Image.open(io.BytesIO(data[a:b].tobytes())).convert("RGB")) for a, b in pairs]
    return np.stack(images), labels


def _torchvision_split(work: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    from torchvision.datasets import CIFAR10

    data = CIFAR10(str(work), train=split == "train", download=True)
    return data.data, np.asarray(data.targets)


def normalise(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] to float32 with the ImageNet statistics, which teacher and student share."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (MEAN, STD))
    return (images.float() - mean) / std


# The teachers


def make_vit(weights: str) -> nn.Module:
    """The ViT-S/14 in eval mode, without head."""
    import timm
    from safetensors.torch import load_file

    model = timm.create_model(VIT, pretrained=False, num_classes=0, dynamic_img_size=True)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    return model.eval()


def make_convnet(weights: str) -> nn.Module:
    """EfficientNet-Lite0 in eval mode, without head; its file names tensors otherwise, in timm's order."""
    import timm

    model: Any = timm.create_model(CONVNET, pretrained=False)
    source = [v for k, v in torch.load(weights, weights_only=True).items() if "num_batches_tracked" not in k]
    names = [k for k in model.state_dict() if "num_batches_tracked" not in k]
    model.load_state_dict(dict(zip(names, source, strict=True)), strict=False)
    model.reset_classifier(0)
    return model.eval().to(memory_format=torch.channels_last)


def teacher_features(args: argparse.Namespace, images: Tensor, split: str) -> Tensor:
    """Features of both teachers side by side, float32 [N, 384 + 1280]; computed once, then read from `--work`."""
    parts = []
    for name, make, pixels in (("vit", make_vit, 98), ("convnet", make_convnet, 128)):
        path = Path(args.work) / f"{name}_{split}.pt"
        if not path.exists():
            torch.save(_features(make(getattr(args, name)), images, pixels, name), path)
        parts.append(torch.load(path, weights_only=True).float())
    return torch.cat(parts, 1)


@torch.inference_mode()
def _features(teacher: nn.Module, images: Tensor, pixels: int, name: str, batch: int = 100) -> Tensor:
    """float16 [N, D] of images enlarged to `pixels`; `name` is for the progress lines."""
    rows, start = [], time.time()
    for part in images.split(batch):
        x = normalise(part) if name == "vit" else (part.float() - 127) / 128
        x = F.interpolate(x, size=(pixels, pixels), mode="bicubic", antialias=True)
        with torch.autocast("cpu", torch.bfloat16):
            rows.append(teacher(x).half())
        if len(rows) % 50 == 0:
            print(f"{name} {len(rows) * batch}/{len(images)} {time.time() - start:.0f} s", flush=True)
    return torch.cat(rows)


def fit_head(features: Tensor, labels: Tensor, steps: int = 100) -> nn.Linear:
    """Logistic regression on standardised features, folded back to raw ones (L-BFGS, weight decay 1e-3)."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    x, head = (features - mean) / std, nn.Linear(features.shape[1], int(labels.max()) + 1)
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(head(x), labels) + 1e-3 * head.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]  # the stub wants float
    with torch.no_grad():
        head.weight /= std
        head.bias.sub_(head.weight @ mean)
    return head.requires_grad_(False)


# The student


class Student(nn.Module):
    """The nano ViT with a linear map from its CLS feature [N, 192] to the teachers' (standardised)."""

    def __init__(self, vit: Any, teacher_width: int) -> None:
        super().__init__()
        self.vit = vit
        self.to_teacher = nn.Linear(vit.embed_dim, teacher_width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        cls = self.vit.forward_head(self.vit.forward_features(x), pre_logits=True)
        return self.vit.head(cls), self.to_teacher(cls)


def augment(images: Tensor, pad: int = 4) -> Tensor:
    """Random flip and shift by up to `pad` pixels (edges reflected), each image its own: uint8 to normalised float."""
    n, _, height, width = images.shape
    x = F.pad(normalise(images), (pad,) * 4, mode="reflect")
    top, left = (torch.randint(2 * pad + 1, (n, 1)) for _ in range(2))
    columns = left + torch.arange(width)
    flip = torch.rand(n, 1) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    rows = top + torch.arange(height)
    return x[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def distil_loss(logits: Tensor, guess: Tensor, y: Tensor, t_logits: Tensor, t_features: Tensor) -> Tensor:
    """0.5 cross-entropy + 2 KL to the teachers at temperature 2 + squared error of standardised features."""
    soft = F.kl_div(F.log_softmax(logits / 2, -1), F.softmax(t_logits / 2, -1), reduction="batchmean")
    return 0.5 * F.cross_entropy(logits, y) + 2 * soft + F.mse_loss(guess, t_features)


@torch.inference_mode()
def accuracy(vit: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers in float32, eval mode."""
    vit.eval()
    guesses = torch.cat([vit(normalise(part)).argmax(1) for part in images.split(500)])
    vit.train()
    return float((guesses == labels).float().mean())


def train(
    student: Student,
    data: dict[str, Tensor],
    targets: tuple[Tensor, Tensor],
    args: argparse.Namespace,
    stop: int | None = None,
) -> None:
    """AdamW, one-epoch warm-up, cosine to zero, bf16 autocast; a checkpoint after each epoch, from which it goes on.

    `targets` are the teachers' logits [N, classes] and standardised features [N, D]. `stop` ends early (for tests).
    """
    steps, epochs = len(data["train_x"]) // args.batch, len(args.drop)
    optimiser = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: _cosine(i, steps, steps * epochs))
    saved, rank, world = Path(args.work) / "checkpoint.pt", *_place()
    for epoch in range(_resume(saved, student, optimiser, schedule), stop or epochs):
        drop_patches(student.vit, args.drop[epoch])
        order = torch.randperm(len(data["train_x"]), generator=torch.Generator().manual_seed(args.seed + epoch))
        torch.manual_seed(args.seed + epoch * world + rank)  # a resumed run draws the same flips, shifts and patches
        start, total = time.time(), 0.0
        for rows in order[: steps * args.batch].split(args.batch):
            total += _step(student, optimiser, data, targets, rows[rank::world])
            schedule.step()
        if rank == 0:
            state = {"epoch": epoch + 1, "student": student.state_dict(), "optimiser": optimiser.state_dict()}
            _save_atomically(state | {"schedule": schedule.state_dict()}, saved)
            print(f"epoch {epoch + 1}/{epochs} loss {total / steps:.4f} {time.time() - start:.0f} s", flush=True)


def _step(student: Student, optimiser: Any, data: dict[str, Tensor], targets: Any, rows: Tensor) -> float:
    """One update, with gradients averaged over the workers; returns this worker's loss."""
    with torch.autocast("cpu", torch.bfloat16):
        logits, guess = student(augment(data["train_x"][rows]))
    loss = distil_loss(logits.float(), guess.float(), data["train_y"][rows], *(t[rows] for t in targets))
    loss.backward()
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
        dist.all_reduce(flat)
        vector_to_grads(flat / dist.get_world_size(), student)
    nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    return loss.item()


def vector_to_grads(flat: Tensor, model: nn.Module) -> None:
    """Split one vector into the gradients of all parameters, in their order."""
    parameters = list(model.parameters())
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)


def _place() -> tuple[int, int]:
    """This worker's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def drop_patches(vit: Any, share: float) -> None:
    """Leave out a random share of the patches: half of them costs half of the time. timm's own switch, set later."""
    from timm.layers import PatchDropout

    vit.patch_drop = PatchDropout(share, num_prefix_tokens=vit.num_prefix_tokens) if share else nn.Identity()


def plain_attention(vit: Any) -> None:
    """On CPU the backward of the fused attention takes a third of a step; the plain one is 1.6 times faster."""
    for block in vit.blocks:
        block.attn.fused_attn = False


def _cosine(step: int, warm: int, total: int) -> float:
    return min((step + 1) / warm, 0.5 * (1 + float(np.cos(np.pi * min(step / total, 1.0)))))


def _resume(path: Path, student: nn.Module, optimiser: Any, schedule: Any) -> int:
    """The number of epochs already done, with everything restored to that point."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    student.load_state_dict(state["student"])
    optimiser.load_state_dict(state["optimiser"])
    schedule.load_state_dict(state["schedule"])
    return state["epoch"]


def _save_atomically(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def build_nano(args: argparse.Namespace) -> None:
    """Compute what is kept on disk, then train in `--workers` processes of one thread each.

    One thread per process because a step then waits once, not at every operation: on shared cores three times faster.
    """
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    teacher_features(args, load_cifar10(args.cifar10, work)["train_x"], "train")
    (work / "meeting").unlink(missing_ok=True)
    torch.multiprocessing.spawn(_train_nano, (args,), args.workers)


def _train_nano(rank: int, args: argparse.Namespace) -> None:
    """Train (or go on), write assets/nano_vit.safetensors, print the test accuracy of the file that was written."""
    from safetensors.torch import save_file

    from visionpeft.models import nano

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{Path(args.work).resolve()}/meeting", rank=rank, world_size=args.workers)
    torch.manual_seed(args.seed)
    data = load_cifar10(args.cifar10, Path(args.work))
    features = teacher_features(args, data["train_x"], "train")
    head = fit_head(features, data["train_y"])
    student = Student(nano.create(pretrained=False), features.shape[1])
    plain_attention(student.vit)
    start_from_teacher(student.vit, args, data["train_x"])
    targets = head(features), (features - features.mean(0)) / (features.std(0) + 1e-3)
    train(student, data, targets, args)
    dist.destroy_process_group()
    if rank:
        return
    save_file({k: v.half().contiguous() for k, v in student.vit.state_dict().items()}, ASSETS / "nano_vit.safetensors")
    report(args, data, head)


def start_from_teacher(student: Any, args: argparse.Namespace, images: Tensor) -> None:
    """Fill the student by `Slim`, whose statistics come from a few images at the student's 8x8 patches."""
    rows = torch.randperm(len(images))[: args.calibration]  # the file may be sorted by class
    side = student.patch_embed.grid_size[0] * 14
    x = F.interpolate(normalise(images[rows]), size=(side, side), mode="bicubic", antialias=True)
    Slim(make_vit(args.vit).requires_grad_(False), len(student.blocks), student.embed_dim, x).fill(student)


def report(args: argparse.Namespace, data: dict[str, Tensor], head: nn.Linear) -> None:
    """Print the figures of the model card. Test images are read here for the first time, and once."""
    from visionpeft.models import nano

    teacher = teacher_features(args, data["test_x"], "test")
    figures = {
        "test_accuracy": accuracy(nano.create(), data["test_x"], data["test_y"]),
        "teacher_test_accuracy": float((head(teacher).argmax(1) == data["test_y"]).float().mean()),
        "parameters": sum(p.numel() for p in nano.create().parameters()),
        "bytes": (ASSETS / "nano_vit.safetensors").stat().st_size,
    }
    print(json.dumps(figures, indent=2))


# Fashion-MNIST


def read_idx(path: Path) -> np.ndarray:
    """An idx file of bytes, gzipped or not (the format is on the MNIST page: magic, sizes big-endian, data)."""
    import gzip

    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    sizes = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)


def build_fashion(args: argparse.Namespace) -> None:
    """Draw the class-balanced piece and write assets/fashion_mnist_small.npz."""
    generator = np.random.default_rng(args.seed)
    arrays: dict[str, Any] = {"classes": np.array(FASHION_CLASSES)}
    for split, prefix, per_class in (("train", "train", 100), ("test", "t10k", 200)):
        images = read_idx(Path(args.source) / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(Path(args.source) / f"{prefix}-labels-idx1-ubyte.gz")
        rows = [generator.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in range(10)]
        order = generator.permutation(np.concatenate(rows))
        arrays[f"{split}_x"], arrays[f"{split}_y"] = images[order], labels[order].astype(np.int64)
    np.savez_compressed(ASSETS / "fashion_mnist_small.npz", **arrays)


FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    fashion = jobs.add_parser("fashion", help="write assets/fashion_mnist_small.npz")
    fashion.add_argument("--source", default="/usr/share/datasets/fashion-mnist", help="folder of the four idx files")
    fashion.add_argument("--seed", type=int, default=0)
    nano = jobs.add_parser("nano", help="train assets/nano_vit.safetensors")
    nano.add_argument("--cifar10", help="npz of JPEG bytes; without it torchvision downloads the set")
    nano.add_argument("--vit", required=True, help=f"safetensors of {VIT}, teacher and start")
    nano.add_argument("--convnet", required=True, help=f"state dict of {CONVNET}, second teacher")
    nano.add_argument("--work", default="runs/nano", help="targets and checkpoints")
    nano.add_argument("--batch", type=int, default=128)
    nano.add_argument("--lr", type=float, default=1e-3)
    nano.add_argument("--calibration", type=int, default=256, help="images that choose directions, heads and units")
    nano.add_argument("--drop", type=float, nargs="+", default=DROP, help="share of patches left out, per epoch")
    nano.add_argument("--seed", type=int, default=0)
    nano.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    {"fashion": build_fashion, "nano": build_nano}[args.job](args)


if __name__ == "__main__":
    main()
