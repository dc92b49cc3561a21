"""Memory and time of adapters against the frozen model, full fine-tuning and PEFT.

    python scripts/benchmark.py                               # all subjects; writes docs/benchmarks.md and its JSON
    python scripts/benchmark.py --subjects vit_s --steps 10
    python scripts/benchmark.py --check                       # deterministic goals only, on small models; no timing

Bytes are those alive after the forward pass, counted by the allocator (`visionpeft.memory.live_bytes`), so they are
the same on every run. Times are CPU seconds of this process for forward and backward on one thread (wall seconds on
CUDA): contenders take turns, step by step, and the figure is the median over the rounds of the ratio to the frozen
model in the same round. "Frozen" lets the gradient through to the input, as adapters near the input need it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import visionpeft as vp
from visionpeft.memory import live_bytes

ROOT = Path(__file__).resolve().parents[1]
ATTENTION = "query key value attn_out"

Batch = tuple[tuple[Any, ...], dict[str, Any]]


# What is measured: a model and a batch for it


def timm_model(name: str, size: int, **arguments: Any) -> Callable[[int], tuple[nn.Module, Batch]]:
    def make(batch: int) -> tuple[nn.Module, Batch]:
        import timm

        model = timm.create_model(name, num_classes=100, **arguments)
        return model, ((torch.randn(batch, 3, size, size, requires_grad=True),), {})

    return make


def clip_model(name: str, **text: Any) -> Callable[[int], tuple[nn.Module, Batch]]:
    """Both towers; the gradient reaches the images and, since tokens take none, the embedded text."""

    def make(batch: int) -> tuple[nn.Module, Batch]:
        import open_clip

        model = open_clip.create_model(name)
        model.token_embedding.register_forward_hook(lambda m, i, y: y if y.requires_grad else y.requires_grad_())
        size, length = model.visual.image_size[0], model.context_length
        images = torch.randn(batch, 3, size, size, requires_grad=True)
        return model, ((images, torch.randint(1, 999, (batch, length))), {})

    return make


def unet(width: int, context: int, heads: int) -> Callable[[int], tuple[nn.Module, Batch]]:
    """The UNet of SD 1.5 where width is 320; 32 x 32 latents, 77 tokens."""

    def make(batch: int) -> tuple[nn.Module, Batch]:
        from diffusers import UNet2DConditionModel

        widths = (width, 2 * width, 4 * width, 4 * width)
        model = UNet2DConditionModel(sample_size=32, block_out_channels=widths, cross_attention_dim=context,
                                     attention_head_dim=heads, norm_num_groups=32)  # fmt: skip
        latents = torch.randn(batch, 4, 32, 32, requires_grad=True)
        text = torch.randn(batch, 77, context, requires_grad=True)
        return model, ((latents, torch.tensor(500), text), {"return_dict": False})

    return make


@dataclass(frozen=True)
class Subject:
    title: str
    make: Callable[[int], tuple[nn.Module, Batch]]
    batch: int
    goal: float
    """Most that LoRA on all Linears may keep, as a share of the frozen model."""


SUBJECTS = {
    "vit_s": Subject("ViT-S/16, 224 px", timm_model("vit_small_patch16_224", 224), 8, 1.01),
    "vit_b": Subject("ViT-B/16, 224 px", timm_model("vit_base_patch16_224", 224), 4, 1.01),
    "swin_t": Subject("Swin-T, 224 px", timm_model("swin_tiny_patch4_window7_224", 224), 4, 1.10),
    "convnext_t": Subject("ConvNeXt-T, 224 px", timm_model("convnext_tiny", 224), 4, 1.01),
    "clip": Subject("open_clip ViT-B-32, both towers", clip_model("ViT-B-32"), 8, 1.01),
    "unet": Subject("SD 1.5 UNet, 32 x 32 latents", unet(320, 768, 8), 1, 1.01),
}
SMALL = {
    "vit": Subject("ViT-S, 2 blocks", timm_model("vit_small_patch16_224", 224, depth=2), 4, 1.01),
    "swin": Subject("Swin-T, 4 blocks", timm_model("swin_tiny_patch4_window7_224", 224, depths=(1, 1, 1, 1)), 2, 1.10),
    "convnext": Subject("ConvNeXt-T, 4 blocks", timm_model("convnext_tiny", 224, depths=(1, 1, 1, 1)), 2, 1.01),
    "unet": Subject("UNet, a tenth as wide", unet(32, 64, 4), 2, 1.03),
}
"""For --check; the small UNet has few channels for the rank, and so a goal of its own."""


# Who is measured: ways to make a model learn


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def ours(method: Any, **options: Any) -> Callable[[nn.Module], nn.Module]:
    def dress(model: nn.Module) -> nn.Module:
        vp.attach(model.requires_grad_(False), method, **options)
        return model

    return dress


def peft_lora(**options: Any) -> Callable[[nn.Module], nn.Module]:
    def dress(model: nn.Module) -> nn.Module:
        import peft

        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        keep = [n for n in names if not n.endswith(("head", "head.fc"))]
        return peft.inject_adapter_in_model(peft.LoraConfig(r=8, lora_alpha=8, target_modules=keep, **options), model)

    return dress


CONTENDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "frozen": frozen,
    "LoRA r8, all Linears": ours(vp.LoRA(rank=8, targets="linear")),
    "PEFT LoRA r8, all Linears": peft_lora(),
    "LoRA r8, dropout 0.25, attention": ours(vp.LoRA(rank=8, targets=ATTENTION, dropout=0.25)),
    "SSF": ours(vp.SSF()),
    "SSF, all computed again": ours(vp.SSF(recompute="attn_out mlp_out")),
    "BitFit": ours("bitfit"),
    "LN-tuning": ours("ln_tuning"),
    "AdaptFormer-8": ours(vp.AdaptFormer(hidden=8)),
    "full fine-tuning": lambda model: model.requires_grad_(True),
}
CHECKED = ("frozen", "LoRA r8, all Linears", "LoRA r8, dropout 0.25, attention", "SSF", "SSF, all computed again")


# The measurements


@dataclass
class Row:
    """One contender on one subject; ratios are to the frozen model."""

    subject: str
    contender: str
    precision: str
    batch: int
    live_mib: float
    live_ratio: float
    step_seconds: float | None = None
    step_ratio: float | None = None
    step_spread: float | None = None
    """Half the distance between the quartiles of the rounds' ratios."""


@dataclass
class Report:
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)


class Contender:
    """A dressed model with its batch."""

    def __init__(self, subject: Subject, dress: Callable[[nn.Module], nn.Module], precision: str, device: str) -> None:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, (args, self.kwargs) = subject.make(subject.batch)
            self.model = dress(model.to(device)).train()
        self.args = tuple(a.detach().to(device).requires_grad_(a.requires_grad) for a in args)
        self.precision, self.device = precision, device

    def forward(self) -> Tensor:
        dtype = torch.bfloat16
        with torch.autocast(self.device, dtype, enabled=self.precision == "bf16"):
            out = self.model(*self.args, **self.kwargs)
        out = out if isinstance(out, Tensor) else torch.cat([t.flatten() for t in out if t.requires_grad])
        return out.float().square().mean()

    def step(self) -> float:
        """Seconds for forward and backward."""
        start = self._now()
        self.forward().backward()
        seconds = self._now() - start
        for tensor in (*self.model.parameters(), *self.args):
            tensor.grad = None
        return seconds

    def _now(self) -> float:
        if self.device == "cpu":
            return time.process_time()  # what others do on a shared machine does not count
        torch.cuda.synchronize()
        return time.perf_counter()

    def live(self) -> int:
        self.forward()  # what is made once is not counted
        return live_bytes(self.forward)


def measure(key: str, subject: Subject, names: list[str], precision: str, steps: int, device: str) -> list[Row]:
    """Rows of one subject; all contenders are alive at once and take turns."""
    found = {}
    for name in names:
        try:
            found[name] = Contender(subject, CONTENDERS[name], precision, device)
        except (vp.VisionPEFTError, ImportError, ValueError) as error:
            print(f"{key}: {name} left out: {str(error).splitlines()[0]}", file=sys.stderr)
    live = {name: contender.live() for name, contender in found.items()}
    rows = [Row(subject.title, name, precision, subject.batch, live[name] / 2**20, live[name] / live["frozen"])
            for name in found]  # fmt: skip
    if steps:
        rounds = [{name: contender.step() for name, contender in found.items()} for _ in range(steps + 1)][1:]
        for row in rows:
            ratios = sorted(r[row.contender] / r["frozen"] for r in rounds)
            row.step_seconds = statistics.median(r[row.contender] for r in rounds)
            row.step_ratio = statistics.median(ratios)
            row.step_spread = (ratios[(3 * len(ratios)) // 4] - ratios[len(ratios) // 4]) / 2
    return rows


def machine(device: str) -> dict[str, Any]:
    import timm

    versions = {"torch": torch.__version__, "timm": timm.__version__, "visionpeft": vp.__version__}
    try:
        import peft

        versions["peft"] = peft.__version__
    except ImportError:
        pass
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {"device": device, "processor": name, "threads": torch.get_num_threads(), **versions}


# Output


def markdown(report: Report) -> str:
    lines = ["# Memory and speed", ""]
    lines += ["Made by `python scripts/benchmark.py`, whose head says what the columns mean.", ""]
    lines += ["; ".join(f"{key} {value}" for key, value in report.machine.items()) + ".", ""]
    if report.machine["device"] == "cpu":
        lines += ["**CPU figures.** On a GPU other kernels run, which may keep more or less.", ""]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        groups.setdefault((row.subject, row.precision), []).append(row)
    for (subject, precision), rows in groups.items():
        lines += [f"## {subject}, {precision}, batch {rows[0].batch}", ""]
        lines += ["| | alive after forward, MiB | of frozen | step, s | of frozen |", "|---|---:|---:|---:|---:|"]
        lines += [_line(row) for row in rows] + [""]
    return "\n".join(lines)


def _line(row: Row) -> str:
    timed = "| - | - |"
    if row.step_ratio is not None:
        timed = f"| {row.step_seconds:.3f} | {row.step_ratio:.2f} ± {row.step_spread:.2f} |"
    return f"| {row.contender} | {row.live_mib:.0f} | {row.live_ratio:.3f} {timed}"


def check() -> int:
    """The deterministic goals, on models small enough for every commit; returns 1 if one is missed."""
    missed = 0
    for key, subject in SMALL.items():
        rows = measure(key, subject, list(CHECKED), "fp32", 0, "cpu")
        goals = {"LoRA r8, all Linears": subject.goal, "LoRA r8, dropout 0.25, attention": max(1.02, subject.goal)}
        if key == "vit":
            # The weight of the patch embedding with gamma in it is kept: 3 % of two blocks, 0.5 % of twelve.
            goals |= {"SSF": 1.16, "SSF, all computed again": 1.06}
        for row in rows:
            if row.contender in goals:
                good = row.live_ratio <= goals[row.contender]
                missed += not good
                verdict = "ok" if good else "MISSED"
                print(f"{verdict:6} {subject.title}: {row.contender} {row.live_ratio:.4f}, goal {goals[row.contender]}")
    return int(missed > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=7, help="timed rounds; 0 measures bytes only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--check", action="store_true", help="deterministic goals on small models, then exit")
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    if given.check:
        return check()
    report = Report(machine(given.device))
    names = ["frozen", *(c for c in given.contenders if c != "frozen")]
    for key in given.subjects:
        for precision in given.precisions:
            report.rows += measure(key, SUBJECTS[key], names, precision, given.steps, given.device)
            given.out.write_text(markdown(report), encoding="utf-8")
            given.out.with_suffix(".json").write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
