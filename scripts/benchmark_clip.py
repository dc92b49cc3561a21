"""Speed of CLIP jobs: adapters in both towers against the frozen model and PEFT, bf16 exactness, classifiers.

    python scripts/benchmark_clip.py                      # all; prints a table, writes docs/benchmarks_clip.json
    python scripts/benchmark_clip.py --quick              # small models, two rounds: does it all run? no figure counts
    python scripts/benchmark_clip.py --only attention     # or exactness, classifier, gda

attention    LoRA of rank 8 on query, key, value and output of every attention of ViT-B-32, both towers, no dropout:
             forward and backward at batches 1 and 16. All contenders are alive at once and take turns, step by step;
             the figure is the median over the rounds of the ratio to the frozen model in the same round, the spread
             half the distance between the quartiles. "Frozen" lets the gradient through to images and embedded text.
             Bytes are those alive after the forward pass. Goals: below PEFT at both batches, at most 1.1 times the
             frozen model at batch 16, bytes at most 1.02.
exactness    600 steps of AdamW in bf16: how many frozen tensors changed a bit. Goal: none.
classifier   zero-shot weights of 40 classes and 80 templates against `open_clip.build_zero_shot_classifier`,
             paired as above. Goal: as fast.
gda          closed form from 160,000 features (1,000 classes, 16 shots, 10 views) of 512 dimensions. Goal: 5 s.

Times are CPU seconds of this process on one thread, on CUDA wall seconds; GDA's are wall seconds too.
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
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visionpeft as vp
from visionpeft.clip.heads import GDA
from visionpeft.memory import live_bytes

ROOT = Path(__file__).resolve().parents[1]
ATTENTION = "query key value attn_out"
Row = dict[str, Any]


def clip(quick: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    """ViT-B-32 with random weights, or a model of two blocks a tower."""
    from open_clip import create_model
    from open_clip.model import CLIP

    torch.manual_seed(0)
    if not quick:
        return create_model("ViT-B-32").to(dtype)
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 1000, "width": 64, "heads": 2, "layers": 2}
    return CLIP(32, vision, text).to(dtype)


def batch(model: Any, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Images that take a gradient, and tokens."""
    weight = next(model.parameters())
    side = model.visual.image_size[0]
    images = torch.randn(size, 3, side, side, device=device, dtype=weight.dtype, requires_grad=True)
    return images, torch.randint(1, 999, (size, model.context_length), device=device)


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def ours(model: nn.Module) -> nn.Module:
    vp.attach(frozen(model), vp.LoRA(rank=8, targets=ATTENTION))
    return model


def peft_lora(model: nn.Module) -> nn.Module:
    """PEFT's LoRA on `nn.MultiheadAttention`, which adapts in_proj and (twice, its known defect) out_proj."""
    import peft

    names = [name for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    return peft.inject_adapter_in_model(peft.LoraConfig(r=8, lora_alpha=8, target_modules=names), model)


CONTENDERS: dict[str, Callable[[nn.Module], nn.Module]] = {"frozen": frozen, "LoRA": ours, "PEFT LoRA": peft_lora}


class Contender:
    """A dressed model with its batch."""

    def __init__(self, name: str, quick: bool, size: int, device: str, dtype: torch.dtype = torch.float32) -> None:
        model: Any = clip(quick, dtype)
        # Tokens take no gradient: the embedded text stands for them.
        model.token_embedding.register_forward_hook(lambda m, i, y: y if y.requires_grad else y.requires_grad_())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = CONTENDERS[name](model.to(device)).train()
        self.inputs, self.device = batch(model, size, device), device

    def loss(self) -> Tensor:
        image, text, *_ = self.model(*self.inputs)
        return image.float().square().sum() + (image.float() * text.float()).sum()

    def step(self) -> float:
        """Seconds for forward and backward."""
        start = self._now()
        self.loss().backward()
        seconds = self._now() - start
        self.model.zero_grad(set_to_none=True)
        self.inputs[0].grad = None
        return seconds

    def _now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def live(self) -> int:
        self.loss()  # what is made once is not counted
        return live_bytes(self.loss)


def available() -> list[str]:
    try:
        import peft  # noqa: F401
    except ImportError:
        print("PEFT is not installed: left out", file=sys.stderr)
        return [name for name in CONTENDERS if "PEFT" not in name]
    return list(CONTENDERS)


def attention(quick: bool, rounds: int, device: str) -> list[Row]:
    """Paired rows for batches of 1 and 16."""
    rows: list[Row] = []
    for size in (1, 16):
        found = {name: Contender(name, quick, size, device) for name in available()}
        live = {name: contender.live() for name, contender in found.items()}
        times = [{name: c.step() for name, c in found.items()} for _ in range(rounds + 1)][1:]
        for name in found:
            ratios = sorted(r[name] / r["frozen"] for r in times)
            rows.append({
                "case": "attention", "contender": name, "batch": size,
                "seconds": statistics.median(r[name] for r in times), "ratio": statistics.median(ratios),
                "spread": (ratios[(3 * len(ratios)) // 4] - ratios[len(ratios) // 4]) / 2,
                "live_mib": live[name] / 2**20, "live_ratio": live[name] / live["frozen"],
            })  # fmt: skip
    return rows


def exactness(quick: bool, steps: int, device: str) -> list[Row]:
    """How many of the frozen tensors differ after `steps` steps in bf16."""
    rows: list[Row] = []
    for name in available()[1:]:
        contender = Contender(name, quick, 1, device, torch.bfloat16)
        model = contender.model
        before = {id(p): (n, p.detach().clone()) for n, p in model.named_parameters() if not p.requires_grad}
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(steps):
            contender.loss().backward()
            optimiser.step()
            optimiser.zero_grad()
        changed = [n for p in model.parameters() if id(p) in before for n, old in [before[id(p)]]
                   if not torch.equal(p, old)]  # fmt: skip
        rows.append({"case": "exactness", "contender": name, "steps": steps, "frozen_tensors": len(before),
                     "changed": len(changed), "first": changed[:1]})  # fmt: skip
    return rows


def classifier(quick: bool, rounds: int, device: str) -> list[Row]:
    """Paired seconds of this library's builder and open_clip's, and how far their weights differ."""
    import open_clip

    from visionpeft.clip import read_templates, zero_shot_weights

    name, classes = ("RN50", 2) if quick else ("ViT-B-32", 40)
    model, tokenizer = open_clip.create_model(name).to(device).eval(), open_clip.get_tokenizer(name)
    names, templates = list(open_clip.IMAGENET_CLASSNAMES[:classes]), read_templates("openai")[: 4 if quick else 80]

    def timed(build: Callable[[], Tensor]) -> tuple[float, Tensor]:
        start = time.process_time() if device == "cpu" else time.perf_counter()
        weights = build().cpu()  # waits for a GPU
        return (time.process_time() if device == "cpu" else time.perf_counter()) - start, weights

    pairs = [(timed(lambda: zero_shot_weights(model, tokenizer, names, templates)),
              timed(lambda: open_clip.build_zero_shot_classifier(model, tokenizer, names, templates, device=device)))
             for _ in range(rounds + 1)][1:]  # fmt: skip
    ratios = sorted(mine[0] / theirs[0] for mine, theirs in pairs)
    return [{"case": "classifier", "classes": classes, "templates": len(templates),
             "seconds": statistics.median(mine[0] for mine, _ in pairs), "ratio": statistics.median(ratios),
             "spread": (ratios[(3 * len(ratios)) // 4] - ratios[len(ratios) // 4]) / 2,
             "difference": float((pairs[0][0][1] - pairs[0][1][1]).abs().max())}]  # fmt: skip


def gda(quick: bool, rounds: int, device: str) -> list[Row]:
    """Seconds of `GDA.fit` from features; on the CPU."""
    classes, shots, views, width = (50, 4, 2, 64) if quick else (1000, 16, 10, 512)
    torch.manual_seed(0)
    features = F.normalize(torch.randn(classes * shots * views, width), dim=1)
    labels = torch.arange(classes).repeat_interleave(shots * views)
    times = []
    for _ in range(max(rounds // 2, 1)):
        start = time.perf_counter()
        GDA.fit(features, labels, classes)
        times.append(time.perf_counter() - start)
    return [{"case": "gda", "features": list(features.shape), "classes": classes, "seconds": statistics.median(times),
             "spread": (max(times) - min(times)) / 2}]  # fmt: skip


CASES: dict[str, Callable[[bool, int, str], list[Row]]] = {
    "attention": attention, "exactness": exactness, "classifier": classifier, "gda": gda,
}  # fmt: skip


def goals(rows: list[Row]) -> list[tuple[str, bool]]:
    """(goal with its figure, whether it is reached)."""
    found: list[tuple[str, bool]] = []
    by = {(r["contender"], r["batch"]): r for r in rows if r["case"] == "attention"}
    for size in (1, 16):
        mine, theirs = by.get(("LoRA", size)), by.get(("PEFT LoRA", size))
        if mine and theirs:
            told = f"batch {size}: {mine['ratio']:.3f} of frozen, PEFT {theirs['ratio']:.3f}"
            found.append((told, mine["ratio"] < theirs["ratio"]))
        if mine and size == 16:
            found.append((f"batch 16: {mine['ratio']:.3f}, goal 1.1", mine["ratio"] <= 1.1))
        if mine:
            found.append((f"batch {size}: bytes {mine['live_ratio']:.4f}, goal 1.02", mine["live_ratio"] <= 1.02))
    found += [(f"{r['changed']} of {r['frozen_tensors']} frozen tensors changed in {r['steps']} bf16 steps, goal 0",
               r["changed"] == 0) for r in rows if r["case"] == "exactness" and r["contender"] == "LoRA"]  # fmt: skip
    found += [(f"zero-shot weights: {r['ratio']:.3f} of open_clip's time, goal 1", r["ratio"] <= 1)
              for r in rows if r["case"] == "classifier"]  # fmt: skip
    found += [(f"GDA of {r['features']}: {r['seconds']:.2f} s, goal 5", r["seconds"] <= 5)
              for r in rows if r["case"] == "gda"]  # fmt: skip
    return found


def machine(device: str) -> dict[str, Any]:
    import open_clip

    versions = {"torch": torch.__version__, "open_clip": open_clip.__version__, "visionpeft": vp.__version__}
    if "PEFT LoRA" in available():
        import peft

        versions["peft"] = peft.__version__
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {"device": device, "processor": name, "threads": torch.get_num_threads(), **versions}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds")
    parser.add_argument("--steps", type=int, default=600, help="bf16 steps of exactness")
    parser.add_argument("--quick", action="store_true", help="small models, two rounds; writes no file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks_clip.json")
    given = parser.parse_args(arguments)
    if given.device == "cpu":
        torch.set_num_threads(1)
    rows: list[Row] = []
    for name in given.only:
        count = given.steps if name == "exactness" else 2 if given.quick else given.rounds
        rows += CASES[name](given.quick, count, given.device)
        if not given.quick:
            given.out.write_text(json.dumps({"machine": machine(given.device), "rows": rows}, indent=1) + "\n")
    for row in rows:
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    for told, reached in goals(rows):
        print(f"{'ok' if reached else 'MISSED':6} {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
