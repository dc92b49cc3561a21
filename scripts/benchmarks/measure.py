"""Bytes, FLOPs and seconds of contenders, in turns within one process."""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from benchmarks.models import CONTENDERS, LORA, PEFT, Subject, frozen, ours, peft_lora, timm_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

import visionpeft as vp
from visionpeft.memory import live_bytes

Row = dict[str, Any]
Dress = Callable[[nn.Module], nn.Module]
MIB = 2**20
CURVES = (LORA, PEFT, "LoRA, memory=checkpoint", "full fine-tuning")
TIMED = 32  # images at most in a step that is timed for the largest batch: more change nothing but the wait


class Contender:
    """A dressed model with its batch."""

    def __init__(self, subject: Subject, dress: Dress, precision: str, device: str) -> None:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, (args, self.kwargs) = subject.make(subject.batch)
            dtype = torch.bfloat16 if precision == "bf16-model" else torch.float32
            model = model.to(device)
            self.model = dress(model if dtype == torch.float32 else model.to(dtype)).train()
        self.args = tuple(self._given(a, device, dtype) for a in args)
        self.precision, self.device = precision, device

    @staticmethod
    def _given(a: Tensor, device: str, dtype: torch.dtype) -> Tensor:
        moved = a.detach().to(device, dtype if a.is_floating_point() else a.dtype)
        return moved.requires_grad_(a.requires_grad)

    def forward(self) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            out = self.model(*self.args, **self.kwargs)
        out = out if isinstance(out, Tensor) else torch.cat([t.flatten() for t in out if t.requires_grad])
        return out.float().square().mean()

    def step(self) -> float:
        """Seconds for forward and backward."""
        seconds = timed(lambda: self.forward().backward(), self.device)
        for tensor in (*self.model.parameters(), *self.args):
            tensor.grad = None
        return seconds

    def live(self) -> int:
        self.forward()  # what is made once is not counted
        return live_bytes(self.forward)

    def flops(self) -> int:
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _conv_backward})
        counter.mod_tracker = _Whole()  # its hooks on modules cannot stand gradients taken within backward
        with counter:
            self.step()
        return counter.get_total_flops()


def _conv_backward(dy: Any, x: Any, w: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
                   output_padding: Any, groups: int, wanted: list[bool], **shapes: Any) -> int:  # fmt: skip
    """The two gradients, each as many FLOPs as forward; torch takes a grouped weight's gradient for a dense one's."""
    return sum(wanted[:2]) * conv_flop_count(x, w, dy, transposed)


class _Whole:
    """Tells the counter of FLOPs of no module but the whole."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def timed(fn: Callable[[], Any], device: str) -> float:
    """CPU seconds of this process, so that others on the machine do not count; wall seconds on an accelerator."""
    if device == "cpu":
        start = time.process_time()
        fn()
        return time.process_time() - start
    torch.accelerator.synchronize()
    start = time.perf_counter()
    fn()
    torch.accelerator.synchronize()
    return time.perf_counter() - start


def build(subject: Subject, dresses: Mapping[str, Dress], precision: str, device: str) -> dict[str, Contender]:
    found = {}
    for name, dress in dresses.items():
        try:
            found[name] = Contender(subject, dress, precision, device)
        except (vp.VisionPEFTError, ImportError, ValueError) as error:
            print(f"{subject.title}: {name} left out: {str(error).splitlines()[0]}", file=sys.stderr)
    return found


def ratios(rounds: list[dict[str, float]], name: str, to: str) -> tuple[float, float]:
    """Median over the rounds of the ratio within one round, and half the distance between its quartiles."""
    found = sorted(r[name] / r[to] for r in rounds)
    return statistics.median(found), (found[(3 * len(found)) // 4] - found[len(found) // 4]) / 2


def rows(subject: Subject, names: list[str], precision: str, steps: int, device: str) -> list[Row]:
    """One row a contender; bytes and FLOPs one after the other, times with all alive and taking turns."""
    out: list[Row] = []
    for name in names:
        for contender in build(subject, {name: CONTENDERS[name]}, precision, device).values():
            row = {"subject": subject.title, "contender": name, "precision": precision, "batch": subject.batch}
            out.append(row | {"live_mib": contender.live() / MIB, "gflops": contender.flops() / 1e9})
        gc.collect()
    base = out[0]
    for row in out:
        row["live_ratio"], row["flops_ratio"] = (row[k] / base[k] for k in ("live_mib", "gflops"))
    if steps:
        found = build(subject, {row["contender"]: CONTENDERS[row["contender"]] for row in out}, precision, device)
        rounds = [{name: c.step() for name, c in found.items()} for _ in range(steps + 1)][1:]
        for row in out:
            name = row["contender"]
            row["step_seconds"] = statistics.median(r[name] for r in rounds)
            row["step_ratio"], row["step_spread"] = ratios(rounds, name, "frozen")
            if PEFT in found:
                row["step_of_peft"] = ratios(rounds, name, PEFT)[0]
    return out


# What users feel


def largest_batches(budget_mib: float, rounds: int, device: str) -> list[Row]:
    """The largest batch of ViT-S that fits, and images a second at it (at TIMED, if that is less).

    Counted: parameters, gradients and AdamW's two moments of what learns, and the bytes alive after forward, which are
    a straight line in the batch. Not counted: what single operations need for a moment.
    """
    out, found = [], {}
    for name in CURVES:
        small, large = (Contender(_vit_s(b), CONTENDERS[name], "fp32", device) for b in (2, 6))
        own = sum(p.numel() * 4 for p in small.model.parameters())
        own += sum(3 * 4 * p.numel() for p in small.model.parameters() if p.requires_grad)
        a, b = small.live(), large.live()
        image = (b - a) / 4
        batch = int((budget_mib * MIB - own - (a - 2 * image)) / image)
        out.append({"contender": name, "budget_mib": budget_mib, "image_mib": image / MIB, "batch": batch})
        found[name] = Contender(_vit_s(min(batch, TIMED)), CONTENDERS[name], "fp32", device)
    turns = [{name: c.step() for name, c in found.items()} for _ in range(rounds + 1)][1:]
    for row in out:
        row["images_per_second"] = min(row["batch"], TIMED) / statistics.median(t[row["contender"]] for t in turns)
    return out


def _vit_s(batch: int, size: int = 224, depth: int = 12) -> Subject:
    model = timm_model("vit_small_patch16_224", size, img_size=size, depth=depth)
    return Subject("ViT-S/16", model, batch, 1.01)


def merged_latency(rounds: int, device: str) -> list[Row]:
    """Inference of the base model, the same with LoRA acting, and merged."""
    subject = _vit_s(4)
    adapted, merged = (Contender(subject, ours(vp.LoRA(rank=8, targets="linear")), "fp32", device) for _ in range(2))
    vp.tuners(merged.model)["default"].merge()
    found = {"base": Contender(subject, frozen, "fp32", device), "merged": merged, "LoRA acting": adapted}
    for contender in found.values():
        contender.model.eval()
    with torch.no_grad():
        turns = [{name: timed(c.forward, device) for name, c in found.items()} for _ in range(rounds + 1)][1:]
    return [dict(zip(("contender", "ratio", "spread"), (name, *ratios(turns, name, "base")), strict=True))
            for name in found]  # fmt: skip


# Many adapters on one backbone


def fleets(sizes: tuple[int, ...], rounds: int, device: str) -> list[Row]:
    """So many LoRAs with classifiers of their own on one ViT-S: loading, switching, and all in one batch of 8."""
    model, ((x,), _) = _vit_s(8).make(8)
    model, x = model.to(device).eval(), x.detach().to(device)
    out, loaded = [], 0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "a.safetensors"
        vp.attach(model, vp.LoRA(rank=8), train="head").save(path)
        vp.tuners(model)["default"].detach()
        for size in sizes:
            names = [f"a{i}" for i in range(loaded, size)]
            seconds = timed(lambda n=names: [vp.load(model, path, name=name, probe=False) for name in n], device)
            row = {"adapters": size, "load_ms": 1e3 * seconds / len(names)}
            out.append(row | _fleet(model, x, size, rounds, device))
            loaded = size
    return out


@torch.no_grad()
def _fleet(model: nn.Module, x: Tensor, size: int, rounds: int, device: str) -> Row:
    own = sum(p.numel() * p.element_size() for p in vp.tuners(model)["a0"].parameters())
    names = [f"a{i % size}" for i in range(len(x))]

    def single() -> None:
        for name, image in zip(names, x, strict=True):
            vp.activate(model, name)
            model(image[None])

    def mixed() -> None:
        vp.activate(model, names)
        model(x)

    def uniform() -> None:
        vp.activate(model, "a0")
        model(x)

    def switch() -> None:
        vp.activate(model, "a0")
        vp.activate(model, names[1])

    ways = {"single": single, "mixed": mixed, "uniform": uniform, "switch": switch}
    turns = [{name: timed(way, device) for name, way in ways.items()} for _ in range(rounds + 1)][1:]
    seconds = {name: statistics.median(t[name] for t in turns) for name in ways}
    speed = {name: len(x) / seconds[name] for name in ("single", "mixed", "uniform")}
    return {"mib": own / MIB, "switch_ms": 500 * seconds["switch"], **speed}


def graphs() -> list[Row]:
    """Graphs that torch.compile makes of one model while adapters switch and scales change."""
    from torch._dynamo.testing import CompileCounterWithBackend

    model, ((x,), _) = _vit_s(2, depth=2).make(2)
    model, x = model.eval().requires_grad_(False), x.detach()
    for name in ("a", "b"):
        vp.attach(model, vp.LoRA(rank=8, targets="query value head"), name=name, probe=False)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled, out = torch.compile(model, backend=counter, fullgraph=True), []
    acts: dict[str, Callable[[], Any]] = {
        "first run with adapter a": lambda: vp.activate(model, "a"),
        "to b": lambda: vp.activate(model, "b"),
        "back to a": lambda: vp.activate(model, "a"),
        "a at scale 0.5": lambda: vp.activate(model, {"a": 0.5}),
        "a at scale 0.3": lambda: vp.activate(model, {"a": 0.3}),
        "a and b": lambda: vp.activate(model, {"a": 0.7, "b": 0.2}),
        "back to b": lambda: vp.activate(model, "b"),
    }
    with torch.no_grad():
        for what, act in acts.items():
            act()
            before = counter.frame_count
            compiled(x)
            out.append({"change": what, "new_graphs": counter.frame_count - before})
    return out


def compiled(device: str) -> list[Row]:
    """Bytes alive after the forward of compiled models; rebuilding is off there: the partitioner chooses.

    It does not make again what feeds a matrix product of backward, unless it is told that it may.
    """
    import torch._functorch.config as partitioner

    out: list[Row] = []
    for name in ("frozen", LORA, PEFT, "full fine-tuning"):
        for banned in (True, False):
            torch._dynamo.reset()
            contender = Contender(_vit_s(8), CONTENDERS[name], "fp32", device)
            contender.model.compile(backend="aot_eager_decomp_partition")
            with partitioner.patch(ban_recompute_materialized_backward=banned):
                live = contender.live() / MIB
            base = out[0]["live_mib"] if out else live
            out.append({"contender": name, "banned": banned, "live_mib": live, "live_ratio": live / base})
    return out


# Curves for the plots


def curves(rounds: int, device: str) -> list[Row]:
    """Bytes against batch and resolution, step against rank; ViT-S in fp32."""
    names = [n for n in CONTENDERS if n in (*CURVES, "frozen")]
    out = []
    for axis, subjects in (("batch", {b: _vit_s(b) for b in (1, 2, 4, 8)}),
                           ("resolution", {s: _vit_s(2, s) for s in (112, 224, 336, 448)})):  # fmt: skip
        for value, subject in subjects.items():
            for name in names:
                live = Contender(subject, CONTENDERS[name], "fp32", device).live()
                out.append({"axis": axis, "value": value, "contender": name, "mib": live / MIB})
    if rounds:
        out += _ranks((1, 4, 16, 64), rounds, device)
    return out


def _ranks(ranks: tuple[int, ...], rounds: int, device: str) -> list[Row]:
    dresses: dict[str, Dress] = {"frozen": frozen}
    for rank in ranks:
        dresses[f"LoRA {rank}"] = ours(vp.LoRA(rank=rank, alpha=rank, targets="linear"))
        dresses[f"PEFT LoRA {rank}"] = peft_lora(rank)
    found = build(_vit_s(4), dresses, "fp32", device)
    turns = [{name: c.step() for name, c in found.items()} for _ in range(rounds + 1)][1:]
    out = []
    for name in found:
        if name != "frozen":
            kind, _, rank = name.rpartition(" ")
            ratio, spread = ratios(turns, name, "frozen")
            out.append({"axis": "rank", "value": int(rank), "contender": kind, "ratio": ratio, "spread": spread})
    return out
