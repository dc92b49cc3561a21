"""What the figures are to be, and the part of it that is the same on every run, asserted on small models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from benchmarks.measure import Contender, Row, build, graphs
from benchmarks.models import CONTENDERS, DIFFFIT_AGAIN, DROPOUT, LORA, SMALL, SSF_AGAIN, SUBJECTS, Subject, ours

import visionpeft as vp
from visionpeft.binding import Mixin

FIGURES = {"live_ratio": "bytes / frozen", "step_ratio": "step / frozen", "step_of_peft": "step / PEFT's"}


class Goal(NamedTuple):
    """At most `most` in a figure of one contender; `key` is that of the subject."""

    key: str
    precision: str
    contender: str
    figure: str
    most: float

    def row(self, rows: list[Row]) -> tuple[str, str, str, str, str, str]:
        """The goal as cells of a table, with what was measured for it."""
        title = SUBJECTS[self.key].title
        place = (title, self.precision, self.contender)
        found = [r for r in rows if (r["subject"], r["precision"], r["contender"]) == place and self.figure in r]
        what = f"{title}, {self.precision}", self.contender, FIGURES[self.figure], f"{self.most:.2f}"
        if not found:
            return *what, "-", "not measured"
        measured = found[0][self.figure]
        return *what, f"{measured:.3f}", "met" if measured <= self.most else f"missed{self._limit(rows)}"

    def _limit(self, rows: list[Row]) -> str:
        """What the frozen model alone has of it, below which no adapter can be."""
        place = (SUBJECTS[self.key].title, self.precision, "frozen")
        found = [r for r in rows if (r["subject"], r["precision"], r["contender"]) == place and self.figure in r]
        return f"; the frozen model alone {found[0][self.figure]:.3f}" if found else ""


GOALS = [
    *(Goal(key, "fp32", LORA, "live_ratio", subject.goal) for key, subject in SUBJECTS.items()),
    *(Goal(key, "bf16", LORA, "live_ratio", 1.0) for key in SUBJECTS),
    Goal("vit_s", "bf16-model", LORA, "live_ratio", 1.25),
    Goal("vit_b", "fp32", "SSF", "live_ratio", 1.11),
    Goal("vit_b", "fp32", "SSF", "step_ratio", 1.15),
    Goal("vit_b", "fp32", SSF_AGAIN, "live_ratio", 1.01),
    Goal("vit_b", "fp32", SSF_AGAIN, "step_ratio", 1.3),
    Goal("clip", "fp32", DROPOUT, "live_ratio", 1.02),
    Goal("clip", "fp32", DROPOUT, "step_ratio", 1.35),
    Goal("vit_b", "fp32", LORA, "step_ratio", 1.10),
    Goal("vit_s", "fp32", LORA, "step_ratio", 1.15),
    *(Goal(key, "fp32", LORA, "step_of_peft", 0.88) for key in ("vit_s", "vit_b")),
    *(Goal(key, "bf16", LORA, "step_of_peft", 0.80) for key in ("vit_s", "vit_b")),
    *(Goal(key, "fp32", name, "step_ratio", 1.15) for key in ("vit_s", "vit_b") for name in ("BitFit", "LN-tuning")),
]

# Two blocks hold little, so that what is constant weighs more: with SSF the patch embedding's weight with gamma in it.
VIT = {DROPOUT: 1.02, "SSF": 1.16, SSF_AGAIN: 1.06, "BitFit": 1.001, "LN-tuning": 1.001, "AdaptFormer-8": 1.02,
       "Convpass-8": 1.05, "DiffFit": 1.11, DIFFFIT_AGAIN: 1.01, "LoRA, memory=checkpoint": 0.2,
       "LoRA, memory=reversible": 0.35}  # fmt: skip
BYTES: list[tuple[str, str, dict[str, float]]] = [
    *((key, "fp32", {LORA: subject.goal}) for key, subject in SMALL.items()),
    *((key, "bf16", {LORA: 1.0}) for key in SMALL),
    ("vit", "bf16-model", {LORA: 1.25}),
    ("vit", "fp32", VIT),
    *((key, "fp32", {DROPOUT: max(1.02, SMALL[key].goal)}) for key in ("swin", "clip", "unet")),
]


def check() -> int:
    """The deterministic goals, on models small enough for every commit; returns 1 if one is missed."""
    missed = 0
    for what, found, most in _figures():
        missed += not found <= most
        print(f"{'ok' if found <= most else 'MISSED':6} {what}: {found:.7g}, at most {most:.7g}", flush=True)
    return int(missed > 0)


def _figures() -> Iterator[tuple[str, float, float]]:
    """(what, found, at most)."""
    for key, precision, goals in BYTES:
        subject = SMALL[key]
        frozen = _live(subject, "frozen", precision)
        for name, most in goals.items():
            what = f"{subject.title}, {precision}, {name}: bytes / frozen"
            yield what, _live(subject, name, precision) / frozen, most
    lora, ssf = vp.LoRA(rank=8, targets="linear"), vp.SSF()
    yield "LoRA, rebuilt against kept: gradients that differ in any bit", _differing(lora), 0
    yield "SSF, inverted against kept: relative distance of gradients", _distance(ssf), 1e-5
    yield from _merged()
    for row in graphs():
        most = {"first run with adapter a": 1, "a at scale 0.5": 1, "a and b": 2}.get(row["change"], 0)
        yield f"compiled, {row['change']}: new graphs", row["new_graphs"], most


def _live(subject: Subject, name: str, precision: str) -> float:
    """Bytes alive after forward; none is infinitely many."""
    found = build(subject, {name: CONTENDERS[name]}, precision, "cpu")
    return found[name].live() if found else float("inf")


def _gradients(method: Any, memory: str) -> list[torch.Tensor]:
    contender = Contender(SMALL["vit"], ours(method, memory=memory), "fp32", "cpu")
    learning = list(vp.tuners(contender.model)["default"].parameters())
    with torch.no_grad():
        for tensor in learning:
            tensor.add_(torch.randn_like(tensor), alpha=0.02)
    return list(torch.autograd.grad(contender.forward(), learning))


def _differing(method: Any) -> int:
    pairs = zip(_gradients(method, "rebuild"), _gradients(method, "keep"), strict=True)
    return sum(not torch.equal(a, b) for a, b in pairs)


def _distance(method: Any) -> float:
    pairs = zip(_gradients(method, "rebuild"), _gradients(method, "keep"), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def _merged() -> Iterator[tuple[str, float, float]]:
    subject = SMALL["vit"]
    base, merged = (Contender(subject, dress, "fp32", "cpu") for dress in (CONTENDERS["frozen"], CONTENDERS[LORA]))
    vp.tuners(merged.model)["default"].merge()
    dressed = sum(isinstance(module, Mixin) for module in merged.model.modules())
    yield "merged: modules with anything of ours on their path", dressed, 0
    yield "merged: FLOPs beyond the base model's", merged.flops() - base.flops(), 0
