"""Make the nano text-to-image pipeline of `assets/`: autoencoder, then denoiser; the text encoder is nano CLIP's.

    python scripts/build_diffusion_assets.py train --cifar10 cifar10_jpeg.npz --work runs/nano_diffusion
    python scripts/build_diffusion_assets.py figures --cifar10 cifar10_jpeg.npz
    python scripts/build_diffusion_assets.py subjects

Images: the 50,000 of CIFAR-10's training set and their mirror images, and drawn scenes (visionpeft.data.scenes). The
text encoder stays as it is, so latents and text are computed once (kept in `--work`). Seeded by step; given again, a
stopped `train` goes on from its last checkpoint. `figures` prints what the model card says.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from build_assets import load_cifar10
from safetensors.torch import save_file
from torch import Tensor

from visionpeft.clip import nano as nano_clip
from visionpeft.data import scenes
from visionpeft.models import nano_diffusion
from visionpeft.models.nano import CLASSES
from visionpeft.training import checkpoint
from visionpeft.training.order import mix

ASSETS = Path(__file__).resolve().parent.parent / "assets"
WARMUP = 200  # updates


def draw_scenes(count: int, seed: int) -> tuple[Tensor, list[str]]:
    """uint8 (N, 3, 32, 32) and captions."""
    rng = np.random.default_rng(seed)
    drawn = [scenes.scene(rng) for _ in range(count)]
    pixels = np.stack([np.asarray(image) for image, _ in drawn])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), [caption for _, caption in drawn]


def scaled(pixels: Tensor) -> Tensor:
    """uint8 to -1 .. 1."""
    return pixels.float() / 127.5 - 1


def class_prompts(name: str) -> list[str]:
    return [template.format(scenes.article(name)) for template in scenes.TEMPLATES]


# Autoencoder


def train_vae(args: argparse.Namespace, vae: Any, images: Tensor) -> None:
    """L1 and squared error; noise of 0.1 on latents that are held near unit size, so that they stay smooth."""
    optimiser = torch.optim.AdamW(vae.parameters(), 2e-3, weight_decay=1e-4)
    schedule = cosine(optimiser, args.vae_steps)
    vae.train()
    for step in range(args.vae_steps):
        g = torch.Generator().manual_seed(mix(args.seed, 1, step))
        x = scaled(images[torch.randint(len(images), (64,), generator=g)])
        z = vae.encoder(x)
        # The decoder's own forward maps to 0 .. 1 and back; its layers are asked here as its `decode` asks them.
        y = vae.decode(z + 0.1 * torch.randn(z.shape, generator=g)).sample
        loss = (y - x).abs().mean() + 2 * (y - x).square().mean() + 2e-3 * z.square().mean()
        advance(loss, optimiser, schedule)
        if (step + 1) % 100 == 0:
            print(f"autoencoder {step + 1} of {args.vae_steps}: error {(y - x).square().mean():.4f}", flush=True)
    vae.eval()


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> Tensor:
    return torch.cat([vae.encode(scaled(x)).latents.half() for x in pixels.split(500)])


# Denoiser


def cosine(optimiser: Any, steps: int) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min((i + 1) / WARMUP, 1) * (0.02 + 0.98 * (1 + math.cos(math.pi * i / steps)) / 2)
    )


def advance(loss: Tensor, optimiser: Any, schedule: Any) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
    optimiser.step()
    schedule.step()


@torch.no_grad()
def text_table(pipe: Any, captions: list[str]) -> Tensor:
    """What the text encoder makes of each caption, fp16 (N, L, D)."""
    ids = pipe.tokenizer(captions, padding="max_length", truncation=False, return_tensors="pt").input_ids
    return torch.cat([pipe.text_encoder(x)[0].half() for x in ids.split(256)])


def prepare(args: argparse.Namespace, pipe: Any) -> dict[str, Tensor]:
    """Latents of all images, text of all captions and which belong together, computed once."""
    file = Path(args.work) / "prepared.pt"
    if file.exists():
        return torch.load(file, weights_only=True)
    cifar = load_cifar10(args.cifar10, Path(args.work))
    drawn, said = draw_scenes(args.scenes, args.seed)
    mixed = torch.cat([cifar["train_x"][::2], drawn[: len(drawn) // 2]])
    train_vae(args, pipe.vae, mixed)
    z = encode(pipe.vae, torch.cat([cifar["train_x"], cifar["train_x"].flip(-1), drawn]))
    captions = ["", *(prompt for name in CLASSES for prompt in class_prompts(name)), *scenes.captions()]
    where = {caption: i for i, caption in enumerate(captions)}
    kinds = torch.stack([torch.tensor([where[p] for p in class_prompts(name)]) for name in CLASSES])
    found = {
        "z": z, "labels": cifar["train_y"].repeat(2), "drawn": torch.tensor([where[caption] for caption in said]),
        "text": text_table(pipe, captions), "prompts": kinds, "scale": 1 / z[::7].float().std(),
        **{f"vae.{key}": value for key, value in pipe.vae.state_dict().items()},
    }  # fmt: skip
    torch.save(found, file)
    return found


def batch(data: dict[str, Tensor], size: int, share: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents (B, C, 8, 8) and text (B, L, D); `share` of the batch is drawn scenes, a tenth has no caption."""
    some = round(share * size)
    photos = torch.randint(len(data["labels"]), (size - some,), generator=g)
    drawn = torch.randint(len(data["drawn"]), (some,), generator=g)
    prompts = data["prompts"][data["labels"][photos], torch.randint(3, (size - some,), generator=g)]
    which = torch.cat([prompts, data["drawn"][drawn]])
    which = which.masked_fill(torch.rand(size, generator=g) < 0.1, 0)
    z = data["z"][torch.cat([photos, len(data["labels"]) + drawn])].float() * data["scale"]
    return z, data["text"][which].float()


def train_unet(args: argparse.Namespace, pipe: Any, data: dict[str, Tensor]) -> None:
    """v-prediction with min-SNR weights (gamma 5); the pipeline gets the averaged weights."""
    unet, alphas = pipe.unet, pipe.scheduler.alphas_cumprod
    optimiser = torch.optim.AdamW(unet.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = cosine(optimiser, args.steps)
    mean = {name: p.detach().clone() for name, p in unet.named_parameters()}
    file, first = Path(args.work) / "denoiser.pt", 0
    if file.exists():
        state = checkpoint.read(file)
        unet.load_state_dict(state["unet"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        mean, first = state["mean"], state["step"]
    unet.train()
    begin, seen = time.process_time(), 0.0
    for step in range(first, args.steps):
        g = torch.Generator().manual_seed(mix(args.seed, 2, step))
        z, text = batch(data, args.batch, args.share, g)
        t = (torch.rand((), generator=g) + torch.arange(len(z)) / len(z)) % 1 * len(alphas)
        t = t.long()[torch.randperm(len(z), generator=g)]
        a = alphas[t][:, None, None, None]
        noise = torch.randn(z.shape, generator=g)
        v = unet(a.sqrt() * z + (1 - a).sqrt() * noise, t, text).sample
        snr = alphas[t] / (1 - alphas[t])
        weight = snr.clamp(max=5) / (snr + 1)
        loss = (weight * (v - (a.sqrt() * noise - (1 - a).sqrt() * z)).square().mean((1, 2, 3))).mean()
        advance(loss, optimiser, schedule)
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(mean.values()), list(unet.parameters()), 1 - decay)
        seen += float(loss.detach())
        if (step + 1) % 100 == 0:
            cpu = time.process_time() - begin
            print(f"denoiser {step + 1} of {args.steps}: loss {seen / 100:.4f}, {cpu:.0f} s of CPU", flush=True)
            seen = 0.0
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            checkpoint.write(file, {"unet": unet.state_dict(), "optimiser": optimiser.state_dict(), "mean": mean,
                                    "schedule": schedule.state_dict(), "step": step + 1})
            write(args, pipe, mean)
    unet.load_state_dict(mean)
    unet.eval()


def write(args: argparse.Namespace, pipe: Any, mean: dict[str, Tensor]) -> None:
    """The file of weights, with averages in place of the denoiser's own."""
    own = {f"unet.{name}": value.half().contiguous() for name, value in mean.items()}
    path = Path(args.out) / f"{nano_diffusion.NAME}.safetensors"
    save_file(nano_diffusion.pack(pipe) | own, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def text_encoder(pipe: Any) -> None:
    clip = nano_clip.create().model
    tower = {k: v for k, v in clip.state_dict().items() if not k.startswith("visual.")}
    pipe.text_encoder.load_state_dict(nano_diffusion.from_open_clip(tower, len(pipe.tokenizer)))


def build(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    Path(args.work).mkdir(parents=True, exist_ok=True)
    pipe = nano_diffusion.create(pretrained=False)
    text_encoder(pipe)
    print({name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("unet", "vae", "text_encoder")})
    data = prepare(args, pipe)
    vae = {key.removeprefix("vae."): value for key, value in data.items() if key.startswith("vae.")}
    pipe.vae.load_state_dict(vae)
    pipe.vae.register_to_config(scaling_factor=float(data["scale"]))
    train_unet(args, pipe, data)


# Figures and subjects


@torch.no_grad()
def figures(args: argparse.Namespace) -> None:
    """Class-prompted samples under an independent classifier, and the autoencoder's error on test images."""
    from build_assets import normalise

    from visionpeft.models import nano

    pipe = nano_diffusion.create(args.weights)
    judge = nano.create().eval()
    each = args.samples // len(CLASSES)
    right = []
    for label, name in enumerate(CLASSES):
        g = torch.Generator().manual_seed(mix(args.seed, 3, label))
        images = pipe([f"a photo of {scenes.article(name)}"] * each, num_inference_steps=args.inference_steps,
                      guidance_scale=args.guidance, generator=g, output_type="pt").images  # fmt: skip
        right.append((judge(normalise((images * 255).round().byte())).argmax(1) == label).float().mean())
    found: dict[str, Any] = {"recognised": float(torch.stack(right).mean())}
    found |= {name: round(float(share), 3) for name, share in zip(CLASSES, right, strict=True)}
    Path(args.work).mkdir(parents=True, exist_ok=True)
    test = scaled(load_cifar10(args.cifar10, Path(args.work))["test_x"][:1000])
    error = (pipe.vae.decode(pipe.vae.encode(test).latents).sample.clamp(-1, 1) - test).square().mean() / 4
    found["autoencoder_psnr"] = round(float(-10 * error.log10()), 2)
    print(json.dumps(found, indent=1))


def subjects(args: argparse.Namespace) -> None:
    """The five subjects as PNG files in one npz: five to learn from and five other poses, each on its own ground.

    Names say part, subject, number and ground: "train/bee/0 on a beach.png".
    """
    import io

    arrays: dict[str, np.ndarray] = {}
    for number, (name, toy) in enumerate(scenes.SUBJECTS.items()):
        rng = np.random.default_rng(mix(args.seed, 4, number) % 2**32)
        places = rng.permutation(scenes.BACKGROUNDS + scenes.PLAIN)[: 2 * args.poses]
        for i, where in enumerate(places):
            file = io.BytesIO()
            scenes.picture(toy, str(where), rng).save(file, "PNG")
            part = "train" if i < args.poses else "test"
            arrays[f"{part}/{name}/{i % args.poses} {where}.png"] = np.frombuffer(file.getvalue(), np.uint8)
    np.savez(Path(args.out) / "nano_subjects.npz", **arrays)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    job = jobs.add_parser("train", help="write assets/nano_diffusion.safetensors")
    job.add_argument("--cifar10", help="npz of JPEG bytes; without it torchvision downloads the set")
    job.add_argument("--work", default="runs/nano_diffusion", help="checkpoints, latents, text")
    job.add_argument("--out", default=str(ASSETS))
    job.add_argument("--scenes", type=int, default=24000, help="drawn pictures")
    job.add_argument("--vae-steps", type=int, default=1500)
    job.add_argument("--steps", type=int, default=8000)
    job.add_argument("--batch", type=int, default=64)
    job.add_argument("--share", type=float, default=0.35, help="drawn pictures in a batch")
    job.add_argument("--lr", type=float, default=1e-3)
    job.add_argument("--ema", type=float, default=0.999)
    job.add_argument("--every", type=int, default=250, help="updates between checkpoints")
    job.add_argument("--seed", type=int, default=0)
    show = jobs.add_parser("figures", help="print the figures of the card")
    show.add_argument("--cifar10", help="npz of JPEG bytes; without it torchvision downloads the set")
    show.add_argument("--work", default="runs/nano_diffusion")
    show.add_argument("--weights", help="another file than the bundled one")
    show.add_argument("--samples", type=int, default=1000)
    show.add_argument("--inference-steps", type=int, default=25)
    show.add_argument("--guidance", type=float, default=3.0)
    show.add_argument("--seed", type=int, default=0)
    toys = jobs.add_parser("subjects", help="write assets/nano_subjects.npz")
    toys.add_argument("--out", default=str(ASSETS))
    toys.add_argument("--poses", type=int, default=5)
    toys.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    {"train": build, "figures": figures, "subjects": subjects}[args.job](args)


if __name__ == "__main__":
    main()
