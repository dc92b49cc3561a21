"""Speed of diffusion jobs, paired with PEFT and diffusers in one run.

    python scripts/benchmark_diffusion.py                 # all; writes docs/benchmarks_diffusion.{md,json}
    python scripts/benchmark_diffusion.py --quick         # small models, two rounds: does it all run? no figure counts
    python scripts/benchmark_diffusion.py --only load     # or steps, switch, shira, nano; the other figures stay

steps   forward and backward of an adapter on all of attention of SD 1.5's UNet (random weights, 32 x 32 latents, batch
        1): LoRA of rank 4, KronA of 16 x 16, PEFT's LoRA and LoKr of the same numbers, and nothing at all; bytes alive
        after forward
switch  from one of two LoRAs to the other: written into the weights (`unmerge`, `merge` against `unfuse_lora`,
        `fuse_lora`), with merged weights kept and without, and live (`activate` against `set_adapters`)
shira   `switch` of SHiRA against unmerging and merging PEFT's LoRA, both as large as rank 4, at 1280 x 1280
load    a file of a LoRA: `visionpeft.load` (with and without its probe, which runs the model) against
        `unet.load_lora_adapter`
nano    an update of `visionpeft personalise` on the nano pipeline, latents and text from the cache, batch 4, against a
        bare loop of PEFT's LoRA on the same tensors

Contenders take turns; times are CPU seconds on one thread. All UNets of a run share one set of weights.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from benchmarks.measure import MIB, Contender, Row, ratios, timed
from benchmarks.models import SUBJECTS, Batch, Subject, ours, unet
from benchmarks.page import table
from benchmarks.program import DOCS, program
from torch import Tensor, nn

import visionpeft as vp
from visionpeft.formats import diffusers as diffusers_format
from visionpeft.methods.shira import switch as switch_shira

Act = Callable[[], Any]


class Shared:
    """UNets of one set of weights: each an object of its own for adapters to be put on."""

    def __init__(self, quick: bool) -> None:
        self.make = unet(32, 64, 4) if quick else SUBJECTS["unet"].make
        self.first, self.batch = self.make(1)

    def __call__(self, batch: int = 1) -> tuple[nn.Module, Batch]:
        with torch.device("meta"):
            other = type(self.first).from_config(self.first.config)
        other.load_state_dict(self.first.state_dict(), assign=True)
        return other, self.batch


def attention(model: nn.Module) -> list[str]:
    """What `LoRA()` adapts, for PEFT."""
    return [site.path for site in vp.LoRA(rank=1).choose(vp.sites.Backbone(model))]


def theirs(cls: Any, **fields: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: peft.inject_adapter_in_model(cls(target_modules=attention(model), **fields), model)


def lokr(quick: bool) -> Callable[[nn.Module], nn.Module]:
    """Both factors whole, as KronA's are."""
    factor = 4 if quick else 16
    return theirs(peft.LoKrConfig, r=2048, alpha=2048, decompose_factor=factor)


def in_turns(ways: dict[str, Act], rounds: int, device: str, after: Act = lambda: None) -> list[dict[str, float]]:
    """Seconds of each way by round; `after` is called behind each, and not counted. The first round is not, either."""
    turns = []
    for _ in range(rounds + 1):
        turn = {}
        for name, way in ways.items():
            turn[name] = timed(way, device)
            after()
        turns.append(turn)
    return turns[1:]


def row(case: str, what: str, turns: list[dict[str, float]], mine: str, other: str, goal: float | None) -> Row:
    ratio, spread = ratios(turns, mine, other)
    ms = {name: 1e3 * statistics.median(turn[name] for turn in turns) for name in (mine, other)}
    return {"case": case, "what": what, "mine": f"{ms[mine]:.4g} ms", "other": f"{ms[other]:.4g} ms", "ratio": ratio,
            "spread": spread, "goal": goal}  # fmt: skip


def steps(quick: bool, rounds: int, device: str) -> list[Row]:
    side = 4 if quick else 16
    dresses = {
        "LoRA": ours(vp.LoRA(rank=4), probe=False), "PEFT LoRA": theirs(peft.LoraConfig, r=4, lora_alpha=4),
        "KronA": ours(vp.KronA(a1=side, a2=side), probe=False), "PEFT LoKr": lokr(quick),
        "frozen": lambda model: model.requires_grad_(False),
    }  # fmt: skip
    subject = Subject("UNet", Shared(quick), 1, 1.0)
    found = {name: Contender(subject, dress, "fp32", device) for name, dress in dresses.items()}
    learns = {name: sum(p.numel() for p in c.model.parameters() if p.requires_grad) for name, c in found.items()}
    assert learns["LoRA"] == learns["PEFT LoRA"] and learns["KronA"] == learns["PEFT LoKr"], learns
    live = {name: c.live() / MIB for name, c in found.items()}
    turns = in_turns({name: c.step for name, c in found.items()}, rounds, device)
    out = [row("steps", "step of KronA, against PEFT's LoKr", turns, "KronA", "PEFT LoKr", 0.6),
           row("steps", "step of KronA, against LoRA", turns, "KronA", "LoRA", 1.2),
           row("steps", "step of LoRA, against PEFT's", turns, "LoRA", "PEFT LoRA", 1.0),
           row("steps", "step of the frozen model alone, its input taking a gradient, against PEFT's LoKr", turns,
               "frozen", "PEFT LoKr", None)]  # fmt: skip
    for name, other in (("LoRA", "PEFT LoRA"), ("KronA", "PEFT LoKr")):
        out.append({"case": "steps", "what": f"bytes alive after forward, {name}, against {other}",
                    "mine": f"{live[name]:.0f} MiB", "other": f"{live[other]:.0f} MiB",
                    "ratio": live[name] / live[other], "spread": 0.0, "goal": 1.0})  # fmt: skip
    return out


@torch.no_grad()
def shake(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.add_(torch.randn_like(tensor), alpha=1e-3)


def switch(quick: bool, rounds: int, device: str) -> list[Row]:
    shared = Shared(quick)
    (kept, _), (anew, _), (other, _) = shared(), shared(), shared()
    turn = {way: cycle("ab") for way in ("activate", "set_adapters", "kept", "anew", "fuse")}

    def merging(model: nn.Module, way: str) -> Act:
        tuners = {name: vp.attach(model, vp.LoRA(rank=4), name=name, probe=False) for name in "ab"}
        shake([p for tuner in tuners.values() for p in tuner.parameters()])

        def put() -> None:
            name = next(turn[way])
            for tuner in tuners.values():
                tuner.unmerge()
            vp.activate(model, name)
            tuners[name].merge(keep=way == "kept")

        return put

    ways = {way: merging(model, way) for way, model in (("kept", kept), ("anew", anew))}
    for name in "ab":
        other.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=attention(shared.first)), name)
    shake([p for p in other.parameters() if p.requires_grad])

    def fuse() -> None:
        other.unfuse_lora()
        other.fuse_lora(adapter_names=[next(turn["fuse"])])

    live = in_turns({"mine": lambda: vp.activate(kept, next(turn["activate"])),
                     "other": lambda: other.set_adapters(next(turn["set_adapters"]))}, rounds, device)  # fmt: skip
    for _ in "ab":  # both are computed once, and kept
        ways["kept"]()
    fuse()
    written = in_turns(ways | {"other": fuse}, rounds, device)
    other.unfuse_lora()
    size = sum(t.numel() * t.element_size() for t in vp.tuners(kept)["a"].kept.merged.values()) / MIB
    what = "switching merged LoRAs, against unfuse_lora and fuse_lora"
    return [row("switch", f"{what}: merged weights kept, {size:.0f} MiB each", written, "kept", "other", 0.1),
            row("switch", f"{what}: computed anew", written, "anew", "other", None),
            row("switch", "switching live LoRAs, against set_adapters", live, "mine", "other", 1.0)]  # fmt: skip


def shira(quick: bool, rounds: int, device: str) -> list[Row]:
    side = 64 if quick else 1280
    mine, other = (nn.Sequential(*(nn.Linear(side, side) for _ in range(8))).to(device) for _ in range(2))
    tuners = [vp.attach(mine, vp.methods.SHiRA(rank=4, seed=i, targets="linear"), name=f"t{i}", probe=False)
              for i in range(2)]  # fmt: skip
    shake([p for tuner in tuners for p in tuner.parameters()])
    for name in ("t0", "t1"):
        config = peft.LoraConfig(r=4, target_modules=[str(i) for i in range(8)], init_lora_weights=False)
        peft.inject_adapter_in_model(config, other, name)
    turn = {way: cycle((0, 1)) for way in ("mine", "other")}

    def fuse() -> None:
        name = f"t{next(turn['other'])}"
        for layer in other:
            layer.unmerge()
            layer.merge(adapter_names=[name])

    def put() -> None:
        i = next(turn["mine"])
        switch_shira(tuners[1 - i], tuners[i])

    switch_shira(None, tuners[1])
    fuse()
    turns = in_turns({"mine": put, "other": fuse}, 10 * rounds, device)
    what = f"switching SHiRA, against merging PEFT's LoRA, eight Linears of {side} x {side}"
    return [row("shira", what, turns, "mine", "other", 0.1)]


def load(quick: bool, rounds: int, device: str) -> list[Row]:
    shared = Shared(quick)
    (mine, _), (other, _) = shared(), shared()
    with tempfile.TemporaryDirectory() as folder:
        tuner = vp.attach(mine, vp.LoRA(rank=4), probe=False)
        shake(list(tuner.parameters()))
        tuner.save(Path(folder) / "own.safetensors")
        diffusers_format.save(tuner, Path(folder) / "lora.safetensors")
        tuner.detach()

        def after() -> None:
            for own in vp.tuners(mine).values():
                own.detach()
            if getattr(other, "_hf_peft_config_loaded", False):
                other.unload_lora()

        ways = {
            "mine": lambda: vp.load(mine, Path(folder) / "own.safetensors", probe=False),
            "probed": lambda: vp.load(mine, Path(folder) / "own.safetensors"),
            "other": lambda: other.load_lora_adapter(folder, prefix="unet", weight_name="lora.safetensors"),
        }
        turns = in_turns(ways, rounds, device, after)
    what = "loading a LoRA, against load_lora_adapter"
    return [row("load", f"{what}, without the probe", turns, "mine", "other", 0.5),
            row("load", f"{what}, with the probe", turns, "probed", "other", None)]  # fmt: skip


def nano(quick: bool, rounds: int, device: str) -> list[Row]:
    """With random weights, which cost what others cost."""
    from visionpeft.diffusion.families import family_of
    from visionpeft.diffusion.training import Trainer
    from visionpeft.models import nano_diffusion
    from visionpeft.pipelines import personalisation as job
    from visionpeft.training import make_accelerator

    torch.manual_seed(0)
    pipe = nano_diffusion.create(pretrained=False)
    bare = copy.deepcopy(pipe.unet)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        config = job.Config(method="lora:rank=4", batch_size=4, steps=10**6, cache=folder, class_name="toy")
        family = family_of(pipe)
        subject = job.read(config, family, lambda line: None)
        examples, _ = job._examples(config, family, subject, [])
        tuners = stack.enter_context(job.adapters(config, family, subject.token))
        trainer = Trainer(config, family, tuners, examples, [], make_accelerator(), Path(folder))
        family.train()
        x, _, given, *_ = trainer._batch(0)
        one = theirs(peft.LoraConfig, r=4, lora_alpha=4)(bare).train()
        optimiser = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], 1e-4)

        def loop() -> None:
            noise, t = torch.randn_like(x), torch.randint(1000, (len(x),))
            noisy = pipe.scheduler.add_noise(x, noise, t)
            loss = F.mse_loss(one(noisy, t, given["text"]).sample, pipe.scheduler.get_velocity(x, noise, t))
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()

        turns = in_turns({"mine": lambda: trainer._update(0), "other": loop}, 10 * rounds, device)
    return [row("nano", "a cached update of the nano pipeline, against a bare loop", turns, "mine", "other", 1.5)]


CASES: dict[str, Callable[[bool, int, str], list[Row]]] = {
    "steps": steps, "switch": switch, "shira": shira, "load": load, "nano": nano,
}  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    how = "Made by `python scripts/benchmark_diffusion.py`, whose head says what is measured."
    where = "; ".join(f"{key} {value}" for key, value in found["machine"].items())
    lines = ["# Speed of diffusion jobs", "", how, "", f"{where}.", ""]
    body = []
    for r in found["rows"]:
        goal = "" if r["goal"] is None else f"{r['goal']:g}, {'reached' if r['ratio'] <= r['goal'] else '**missed**'}"
        body.append([r["what"], r["mine"], r["other"], f"{r['ratio']:.3f} ± {r['spread']:.3f}", goal])
    return "\n".join([*lines, *table(["", "here", "there", "ratio", "goal: at most"], body), ""])


def main(arguments: list[str] | None = None) -> int:
    return program(__doc__, CASES, markdown, DOCS / "benchmarks_diffusion.md", arguments)


if __name__ == "__main__":
    sys.exit(main())
