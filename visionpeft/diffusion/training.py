"""Updates of an adapter in a diffusion pipeline: batches, losses, rates, an average, checkpoints.

Everything that is drawn at an update is drawn from (seed, number of the micro-batch), so that a killed run goes on to
the same numbers without any saved random state.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionpeft.data.subjects import Crop, Picture, Size, mask_of
from visionpeft.diffusion import objective
from visionpeft.diffusion.caching import Latents, Texts
from visionpeft.diffusion.errors import DiffusionError
from visionpeft.diffusion.families import Conditions, Family
from visionpeft.methods.textual_inversion import TextualInversion
from visionpeft.sites import ROLES
from visionpeft.training import checkpoint, runs
from visionpeft.training.loop import DivergedError
from visionpeft.training.order import mix, seed_all
from visionpeft.tuner import Tuner

WORD_RATE = 1e-3  # Mix-of-Show's for embeddings


@dataclass(frozen=True)
class Example:
    """A picture, the bucket it is fitted into, its prompt."""

    picture: Picture
    size: Size
    prompt: str


class Batches:
    """Micro-batch k of an endless sequence: each epoch goes once through all examples, bucket by bucket.

    A bucket's last batch is filled up from its beginning, so that all batches have the same size.
    """

    def __init__(self, examples: Sequence[Example], size: int, seed: int) -> None:
        self.examples, self.size, self.seed = examples, size, seed
        self.groups: dict[Size, list[int]] = {}
        for i, example in enumerate(examples):
            self.groups.setdefault(example.size, []).append(i)
        self.per_epoch = sum(-(-len(group) // size) for group in self.groups.values())

    def __getitem__(self, k: int) -> list[Example]:
        generator = torch.Generator().manual_seed(mix(self.seed, 10, k // self.per_epoch))
        batches = []
        for _, group in sorted(self.groups.items()):
            order = [group[i] for i in torch.randperm(len(group), generator=generator)]
            for start in range(0, len(order), self.size):
                batches.append([order[(start + j) % len(order)] for j in range(self.size)])
        chosen = int(torch.randperm(len(batches), generator=generator)[k % self.per_epoch])
        return [self.examples[i] for i in batches[chosen]]


@dataclass(frozen=True)
class Schedule:
    """The rate's factor at each update; `segments` are the ends of the first run and of its extensions."""

    kind: str
    warmup: int

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "cosine"):
            raise DiffusionError(f"schedule={self.kind!r}: expected constant or cosine")

    def __call__(self, step: int, segments: Sequence[int]) -> float:
        end = next(s for s in segments if step < s)
        start = max((s for s in segments if s <= step), default=0)
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup and not start else 1.0
        falling = (1 + math.cos(math.pi * (step - start) / (end - start))) / 2 if self.kind == "cosine" else 1.0
        return rising * falling


def learning(tuners: Sequence[Tuner]) -> dict[str, nn.Parameter]:
    """What learns, by the name it has in the adapter file; a tensor of several sites once."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, tensor in _named(tuners):
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _named(tuners: Sequence[Tuner]) -> Iterator[tuple[str, Tensor]]:
    for tuner in tuners:
        yield from tuner._named()


def groups(tuners: Sequence[Tuner], lr: float, rates: Sequence[str]) -> list[dict[str, Any]]:
    """Parameter groups by rate, {"params", "lr", "base"}.

    Args:
        lr: of all but new words, which have `WORD_RATE`.
        rates: "role=rate" or "glob=rate"; the last that fits a tensor counts.

    Raises:
        DiffusionError: one that is malformed, or fits nothing.
    """
    given = [_rate(text) for text in rates]
    used: set[str] = set()
    roles = {site.full if site.kind == "tensor" else str(site): site.role for tuner in tuners for site in tuner.sites}
    words = {id(p) for tuner in tuners if isinstance(tuner.method, TextualInversion) for p in tuner.parameters()}
    by_rate: dict[float, list[nn.Parameter]] = {}
    learns = learning(tuners)
    for name, p in learns.items():
        role = roles.get(name) or next((r for key, r in roles.items() if name.startswith(f"{key}.")), "")
        fitting = [(word, rate) for word, rate in given if word == role or fnmatchcase(name, word)]
        used |= {word for word, _ in fitting}
        usual = WORD_RATE if id(p) in words else lr
        by_rate.setdefault(fitting[-1][1] if fitting else usual, []).append(p)
    if unused := [word for word, _ in given if word not in used]:
        raise DiffusionError(f"rates: {unused[0]!r} fits nothing that learns, such as {next(iter(learns))}")
    return [{"params": params, "lr": rate, "base": rate} for rate, params in by_rate.items()]


def _rate(text: str) -> tuple[str, float]:
    word, equals, number = text.rpartition("=")
    try:
        rate = float(number)
    except ValueError:
        rate = -1.0
    if not equals or not word or rate < 0:
        raise DiffusionError(f"rates: {text!r}: write role=rate or glob=rate; roles are {', '.join(ROLES)}")
    return word, rate


def fingerprint(examples: Sequence[Example], *bases: str) -> str:
    """Of all that the numbers come from beside the settings: images, buckets, prompts, masks, fingerprints of bases."""
    found = blake2b("\n".join(bases).encode(), digest_size=16)
    for e in examples:
        found.update(f"{e.picture.digest} {e.size} {e.prompt} {e.picture.alpha}\n".encode())
        found.update(e.picture.mask.read_bytes() if e.picture.mask is not None else b"")
    return found.hexdigest()


class Trainer:
    """The state of one personalisation; the first of `tuners` is the method's, a second that of a new word."""

    def __init__(self, config: Any, family: Family, tuners: Sequence[Tuner], examples: Sequence[Example],
                 prior: Sequence[Example], accelerator: Any, folder: Path, base: str = "") -> None:  # fmt: skip
        self.config, self.family, self.accelerator, self.folder = config, family, accelerator, folder
        self.tuners, self.tuner = tuners, tuners[0]
        self.batches, self.prior = Batches(examples, config.batch_size, config.seed), prior
        self.cache = Path(config.cache).expanduser()
        self.latents = Latents(family.pipe, self.cache)
        self.texts = None if config.train_text or config.word_vectors else Texts(family, self.cache)
        self.schedule = Schedule(config.schedule, config.warmup)
        self.learns = learning(tuners)
        optimizer = torch.optim.AdamW(groups(tuners, config.rate, config.rates), weight_decay=config.weight_decay)
        self.optimizer = accelerator.prepare(optimizer)
        self.average = None if config.ema is None else {k: p.detach().clone() for k, p in self.learns.items()}
        self.losses: list[float] = []
        self.segments: list[int] = []
        self.origin = fingerprint([*examples, *prior], base, self.latents.digest)
        self._resume()
        self.saved_at = time.monotonic()
        processes = accelerator.num_processes
        if config.accumulation % processes:
            raise DiffusionError(f"accumulation {config.accumulation} cannot be shared by {processes} processes")

    @property
    def step(self) -> int:
        """Updates done."""
        return len(self.losses)

    def run(self, progress: Callable[[int, int, float], None] | None = None,
            after: Callable[[int], None] | None = None) -> None:  # fmt: skip
        """Do the remaining updates; `after` is called with the number of updates done, after each."""
        while self.step < self.config.steps:
            loss = self._update(self.step)
            self.losses.append(loss)
            if after is not None:
                after(self.step)  # before the checkpoint, behind which it would not be done again
            if time.monotonic() - self.saved_at >= self.config.checkpoint_seconds:
                self.save()
            if progress is not None:
                progress(self.step, self.config.steps, loss)
        self.save()

    def _update(self, step: int) -> float:
        factor = self.schedule(step, self.segments)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["base"]
        rank, world, each = self.accelerator.process_index, self.accelerator.num_processes, self.config.accumulation
        found = torch.zeros((), dtype=torch.float64)
        for j in range(rank, each, world):
            seed_all(self.config.seed, step, j)  # dropout
            found += self._backward(step * each + j) / each
        if world > 1:
            for p in self.learns.values():
                p.grad = self.accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "sum")
            found = self.accelerator.reduce(found.to(self.accelerator.device), "sum").cpu()
        if self.config.clip is not None:
            self.accelerator.clip_grad_norm_(list(self.learns.values()), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            decay = min(self.config.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.learns.values()], 1 - decay)
        return float(found)

    def _backward(self, k: int) -> float:
        x, mask, given, prior, names = self._batch(k)
        generator = torch.Generator().manual_seed(mix(self.config.seed, 12, k))
        noise = objective.draw_noise(x, self.config.noise_offset, generator)
        family, device = self.family, self.accelerator.device
        t = objective.draw_times(len(x), family.kind, self._steps, generator)
        noisy, target = objective.noised(family.kind, x, noise, t, family.alphas)
        with self.accelerator.autocast():
            given = {key: value.to(device) for key, value in given.items()}
            predicted = family.predict(noisy.to(device), t.to(device), given)
        losses = objective.examples_loss(predicted, target.to(device), None if mask is None else mask.to(device))
        weights = objective.snr_weights(family.kind, t, family.alphas, self.config.min_snr).to(device)
        loss = objective.total(losses, weights, prior.to(device), self.config.prior_weight)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DivergedError(
                f"the loss became {value} at update {self.step + 1}, with {', '.join(names)}: lower the learning rate, "
                "or look at these images"
            )
        self.accelerator.backward(loss / self.config.accumulation)
        return value

    @property
    def _steps(self) -> int:
        return 1000 if self.family.alphas is None else len(self.family.alphas)

    def _batch(self, k: int) -> tuple[Tensor, Tensor | None, Conditions, Tensor, list[str]]:
        """Latents, mask, conditions, which are class images, and names of the micro-batch k."""
        generator = torch.Generator().manual_seed(mix(self.config.seed, 11, k))
        own = self.batches[k]
        size = own[0].size
        drawn = torch.randint(max(1, len(self.prior)), (len(own),), generator=generator).tolist()
        prior = [self.prior[i] for i in drawn] if self.prior else []
        items = [(e, self._crop(generator)) for e in own] + [(e, Crop()) for e in prior]
        found = [self.latents.get(e.picture, size, crop) for e, crop in items]
        mean, std = (torch.stack([f[key] for f in found]) for key in ("mean", "std"))
        x = mean + std * torch.randn(mean.shape, generator=generator)
        dropped = torch.rand(len(items), generator=generator) < self.config.caption_dropout
        prompts = ["" if drop else e.prompt for (e, _), drop in zip(items, dropped.tolist(), strict=True)]
        given = self.family.text(prompts) if self.texts is None else self.texts.get(prompts)
        given |= self._sizes(items, size, [f["corner"] for f in found])
        is_prior = torch.arange(len(items)) >= len(own)
        return x, self._masks(items, size), given, is_prior, [e.picture.path.name for e, _ in items]

    def _sizes(self, items: list[tuple[Example, Crop]], size: Size, corners: list[Tensor]) -> Conditions:
        found = [self.family.sized(e.picture.size, (int(c[0]), int(c[1])), size)
                 for (e, _), c in zip(items, corners, strict=True)]  # fmt: skip
        return {key: torch.cat([f[key] for f in found]) for key in found[0]}

    def _masks(self, items: list[tuple[Example, Crop]], size: Size) -> Tensor | None:
        found = [mask_of(e.picture, size, crop, self.family.factor) for e, crop in items]
        if all(m is None for m in found):
            return None
        whole = torch.ones(1, size[0] // self.family.factor, size[1] // self.family.factor)
        return torch.stack([whole if m is None else m for m in found])

    def _crop(self, generator: torch.Generator) -> Crop:
        number = torch.randint(self.config.crops, (), generator=generator)
        mirrored = torch.rand((), generator=generator)
        flip = self.config.flip and bool(mirrored < 0.5)
        if self.config.crops == 1:
            return Crop(flip=flip)
        place = torch.rand(2, generator=torch.Generator().manual_seed(mix(self.config.seed, 13, int(number))))
        return Crop(round(float(place[0]), 4), round(float(place[1]), 4), flip)

    # ---- what is kept

    def state(self) -> dict[str, Tensor]:
        """All tensors of the adapters as they are, not copied."""
        return {name: p.detach() for name, p in _named(self.tuners)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy in what `state` or `result` gave."""
        for tuner in self.tuners:
            tuner.load_state_dict({name: state[name] for name in tuner.state_dict()})

    def result(self) -> dict[str, Tensor]:
        """All tensors, what learnt as its average if there is one; a tied tensor under all its names."""
        if self.average is None:
            return self.state()
        first = {id(p): name for name, p in self.learns.items()}
        return {name: self.average[first[id(p)]] if id(p) in first else p.detach() for name, p in _named(self.tuners)}

    def rows(self) -> list[dict[str, float]]:
        base = self.config.rate
        return [{"step": i + 1, "lr": base * self.schedule(i, self.segments), "loss": loss}
                for i, loss in enumerate(self.losses)]  # fmt: skip

    def save(self) -> None:
        """Write checkpoint.pt and metrics.jsonl."""
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            checkpoint.write(self.folder / "checkpoint.pt", {
                "adapter": self.state(), "average": self.average, "losses": self.losses,
                "optimizer": self.optimizer.state_dict(), "segments": self.segments, "origin": self.origin,
                "scaler": None if scaler is None else scaler.state_dict(),
            })  # fmt: skip
            runs.write_text(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows()))
        self.saved_at = time.monotonic()

    def _resume(self) -> None:
        path, steps = self.folder / "checkpoint.pt", self.config.steps
        if path.exists():
            state = checkpoint.read(path)
            if state.get("origin", self.origin) != self.origin:
                raise DiffusionError(f"{self.folder} holds a run on other images, captions, masks or weights of the "
                                     "base: give it those again, or choose another out")  # fmt: skip
            self.load(state["adapter"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.losses, self.segments = list(state["losses"]), list(state["segments"])
            if self.average is not None:
                self.average = state["average"]
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        last = self.segments[-1] if self.segments else 0
        if self.step < last and steps != last:
            raise DiffusionError(f"{self.folder} holds an unfinished run of {last} steps, {self.step} of them done: "
                                 f"finish it with steps={last} before you extend it")  # fmt: skip
        if steps < last:
            raise DiffusionError(f"{self.folder} holds a run of {last} steps: steps={steps} would be shorter")
        if steps > last:
            self.segments.append(steps)
