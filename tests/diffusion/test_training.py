"""Batches, rates, schedules, averages; a killed run, an extended run; masks, text encoders, accumulation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")

import tiny_pipelines  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import visionpeft as vp  # noqa: E402
from visionpeft.data.subjects import Crop, Picture  # noqa: E402
from visionpeft.diffusion import DiffusionError, family_of, objective  # noqa: E402
from visionpeft.diffusion.training import Batches, Example, Schedule, Trainer, groups, learning  # noqa: E402
from visionpeft.pipelines import personalisation  # noqa: E402
from visionpeft.pipelines.personalisation import Config, adapters, run  # noqa: E402
from visionpeft.training import checkpoint, make_accelerator, runs  # noqa: E402
from visionpeft.training.loop import DivergedError  # noqa: E402
from visionpeft.training.order import mix  # noqa: E402


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Three images of two shapes, prior preservation, everything that draws random numbers."""
    folder = tmp_path / "subject"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(20, 20, 3), (16, 32, 3), (18, 18, 3)]):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i}.png")
    return Config(
        images=str(folder), out=str(tmp_path / "run"), cache=str(tmp_path / "cache"), steps=6, inference_steps=2,
        method="lora:rank=2,dropout=0.2", checkpoint_seconds=0.0, prompt="a {}", previews=("a {}",), class_name="c",
        prior=2, buckets=True, flip=True, crops=2, batch_size=2, accumulation=2, ema=0.9, min_snr=5.0,
        noise_offset=0.1, caption_dropout=0.3, schedule="cosine", warmup=2, lr=1e-2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipelines.sd()


def plain(config: Config, **fields: Any) -> Config:
    """Without anything random but noise and times."""
    return replace(config, prior=0, flip=False, crops=1, caption_dropout=0.0, noise_offset=0.0, warmup=0, min_snr=None,
                   method="lora:rank=2", schedule="constant", ema=None, **fields)  # fmt: skip


def adapter(config: Config) -> dict[str, Tensor]:
    return load_file(config.folder / "adapter.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def losses(config: Config) -> list[float]:
    return [json.loads(line)["loss"] for line in (config.folder / "metrics.jsonl").read_text().splitlines()]


class Killed(Exception):
    pass


def kill_at(step: int) -> Any:
    def progress(done: int, steps: int, loss: float) -> None:
        if done == step:
            raise Killed

    return progress


@pytest.mark.parametrize("method, kill", [("lora:rank=2,dropout=0.2", 1), ("difffit", 4)])
def test_a_killed_run_goes_on_to_the_same_bits(config: Config, pipe: Any, tmp_path: Path, method: str,
                                               kill: int) -> None:  # fmt: skip
    whole = replace(config, method=method, preview_every=2)
    run(whole, pipe=pipe)
    broken = replace(whole, out=str(tmp_path / "broken"))
    with pytest.raises(Killed):
        run(broken, progress=kill_at(kill + 1), pipe=pipe)  # its checkpoint is of one update before
    assert len(checkpoint.read(broken.folder / "checkpoint.pt")["losses"]) == kill + 1
    assert not (broken.folder / "result.json").exists() and not vp.tuners(pipe)
    run(broken, pipe=pipe)
    assert same(adapter(whole), adapter(broken)) and losses(whole) == losses(broken)
    pictures = [p.read_bytes() for c in (whole, broken) for p in sorted((c.folder / "previews").iterdir())]
    assert len(pictures) == 6 and pictures[:3] == pictures[3:]


def test_extending_at_a_constant_rate_is_one_long_run(config: Config, pipe: Any, tmp_path: Path) -> None:
    long = replace(config, schedule="constant", steps=5, out=str(tmp_path / "long"))
    run(long, pipe=pipe)
    short = replace(long, steps=3, out=str(tmp_path / "short"))
    first = run(short, pipe=pipe)
    assert run(short, pipe=pipe) == first, "a finished run is not done again"
    result = run(replace(short, steps=5), pipe=pipe)
    assert same(adapter(long), adapter(short)) and result.segments == [3, 5]
    with pytest.raises(DiffusionError, match="of 5 steps: steps=4 would be shorter"):
        run(replace(short, steps=4), pipe=pipe)


def test_an_unfinished_run_is_not_extended(config: Config, pipe: Any) -> None:
    with pytest.raises(Killed):
        run(config, progress=kill_at(2), pipe=pipe)
    with pytest.raises(DiffusionError, match="unfinished run of 6 steps, 2 of them done"):
        run(replace(config, steps=9), pipe=pipe)
    with pytest.raises(runs.RunError, match="lr is 0.01 there and 0.5 here"):
        run(replace(config, lr=0.5), pipe=pipe)


def test_a_run_does_not_go_on_with_other_images(config: Config, pipe: Any) -> None:
    one = replace(config, checkpoint_seconds=0.0)
    with pytest.raises(Killed):
        run(one, progress=kill_at(2), pipe=pipe)
    path = Path(config.images) / "1.png"
    kept = path.read_bytes()
    Image.new("RGB", (32, 16), (9, 9, 9)).save(path)
    with pytest.raises(DiffusionError, match="a run on other images, captions, masks or weights"):
        run(one, pipe=pipe)
    path.write_bytes(kept)
    other = tiny_pipelines.sd()
    with torch.no_grad():
        other.unet.conv_in.bias.add_(1)
    with pytest.raises(DiffusionError, match="a run on other images, captions, masks or weights"):
        run(one, pipe=other)
    assert run(one, pipe=pipe).steps == 6


def test_schedule() -> None:
    cosine = Schedule("cosine", 2)
    assert [cosine(i, [4]) for i in (0, 1)] == [0.5, (1 + np.cos(np.pi / 4)) / 2]
    assert cosine(4, [4, 8]) == 1.0 and cosine(6, [4, 8]) == 0.5, "an extension has a cosine of its own"
    assert [Schedule("constant", 2)(i, [4, 8]) for i in (0, 1, 5)] == [0.5, 1.0, 1.0]
    with pytest.raises(DiffusionError, match="linear"):
        Schedule("linear", 0)


def test_batches_take_every_example_once_an_epoch() -> None:
    pictures = [Picture(Path(f"{i}"), b"", (8, 8)) for i in range(5)]
    examples = [Example(p, (8, 8) if i < 3 else (4, 16), "") for i, p in enumerate(pictures)]
    batches = Batches(examples, 2, seed=3)
    assert batches.per_epoch == 3
    for epoch in range(4):
        found = [batches[3 * epoch + i] for i in range(3)]
        assert all(len({e.size for e in batch}) == 1 and len(batch) == 2 for batch in found)
        assert {e.picture.path.name for batch in found for e in batch} == set("01234")
    orders = {tuple(e.picture.path.name for i in range(3) for e in batches[3 * epoch + i]) for epoch in range(6)}
    assert len(orders) > 1


def trainer(config: Config, pipe: Any, folder: Path) -> Trainer:
    family = family_of(pipe)
    subject = personalisation.read(config, family, lambda line: None)
    prior = personalisation._prior(config, family, lambda line: None)
    examples, more = personalisation._examples(config, family, subject, prior)
    tuner = vp.attach(pipe, personalisation.method_of(config, family), name="subject")
    return Trainer(config, family, [tuner], examples, more, make_accelerator(), folder)


def test_the_first_loss_written_out(config: Config, pipe: Any, tmp_path: Path) -> None:
    """Micro-batch 0 with prior preservation, min-SNR and noise offset, by hand."""
    t = trainer(replace(config, method="lora:rank=2"), pipe, tmp_path)
    try:
        x, mask, given, prior, _ = t._batch(0)
        assert mask is None and prior.tolist() == [False, False, True, True]
        generator = torch.Generator().manual_seed(mix(config.seed, 12, 0))
        noise = torch.randn(x.shape, generator=generator)
        noise = noise + 0.1 * torch.randn(*x.shape[:2], 1, 1, generator=generator)
        times = torch.randint(1000, (4,), generator=generator)
        a = pipe.scheduler.alphas_cumprod[times]
        noisy = a.sqrt()[:, None, None, None] * x + (1 - a).sqrt()[:, None, None, None] * noise
        with torch.no_grad():
            error = (pipe.unet(noisy, times, given["text"]).sample - noise).square().flatten(1).mean(1)
        snr = a / (1 - a)
        weighted = error * snr.clamp(max=5) / snr
        wanted = weighted[:2].mean() + weighted[2:].mean()
        torch.testing.assert_close(t._backward(0), float(wanted), rtol=1e-6, atol=0)
    finally:
        t.tuner.detach()


def test_accumulation_is_the_mean_of_micro_batches(config: Config, pipe: Any, tmp_path: Path) -> None:
    one = plain(config, accumulation=3, batch_size=1, clip=None)
    t = trainer(one, pipe, tmp_path)
    try:
        parameters = list(t.learns.values())
        wanted = [t._backward(k) for k in range(3)]
        sums = [p.grad.clone() for p in parameters if p.grad is not None]
        t.optimizer.zero_grad()
        kept: list[Tensor] = []
        t.optimizer.step = lambda: kept.extend(p.grad.clone() for p in parameters if p.grad is not None)
        assert abs(t._update(0) - sum(wanted) / 3) < 1e-6
        assert kept and all(torch.equal(a, b) for a, b in zip(sums, kept, strict=True))
    finally:
        t.tuner.detach()


def test_gradient_checkpointing_changes_nothing(config: Config, pipe: Any, tmp_path: Path) -> None:
    a, b = plain(config, steps=2), plain(config, steps=2, gradient_checkpointing=True)
    b = replace(b, out=str(tmp_path / "other"))
    run(a, pipe=pipe), run(b, pipe=pipe)
    for key, value in adapter(a).items():
        torch.testing.assert_close(adapter(b)[key], value, rtol=1e-4, atol=1e-6)
    assert not pipe.unet.is_gradient_checkpointing


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_mixed_precision(config: Config, kind: str) -> None:
    """bf16 where it is computed; latents, adapter and loss stay float32."""
    half = plain(config, steps=2, precision="bf16", gradient_checkpointing=True)
    whole = replace(half, precision="fp32", out=f"{half.out}_whole")
    pipe = tiny_pipelines.PIPELINES[kind]()
    a, b = run(half, pipe=pipe), run(whole, pipe=pipe)
    assert a.loss != b.loss and abs(a.loss - b.loss) < 0.05 * b.loss
    assert {t.dtype for t in adapter(half).values()} == {torch.float32}
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float32}
    assert "forward" not in vars(family_of(pipe).denoiser)


def test_average(config: Config, pipe: Any, tmp_path: Path) -> None:
    """The saved adapter is the average; decay min(0.9, (1 + step) / (10 + step))."""
    t = trainer(replace(plain(config), ema=0.9), pipe, tmp_path)
    try:
        wanted = {k: p.detach().clone() for k, p in t.learns.items()}
        for step in range(3):
            t.losses.append(t._update(step))
            decay = min(0.9, (1 + step) / (10 + step))
            wanted = {k: decay * v + (1 - decay) * t.learns[k].detach() for k, v in wanted.items()}
        for key, value in t.result().items():
            torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-7)
        assert not same(t.result(), t.tuner.state_dict())
    finally:
        t.tuner.detach()


def test_rates_by_role_and_path(pipe: Any) -> None:
    tuner = vp.attach(pipe, vp.LoRA(rank=2), name="rates")
    try:
        found = groups([tuner], 1e-3, ["query=1e-4", "unet.up_blocks.*=5e-4"])
        rate = {id(p): g["lr"] for g in found for p in g["params"]}
        assert len(rate) == len(learning([tuner]))
        for site, module in tuner.adapters.items():
            wanted = 5e-4 if site.path.startswith("unet.up") else 1e-4 if site.role == "query" else 1e-3
            assert {rate[id(p)] for p in module.parameters()} == {wanted}
        for bad, message in (("nothing.*=1", "fits nothing"), ("query", "role=rate"), ("query=x", "role=rate")):
            with pytest.raises(DiffusionError, match=message):
                groups([tuner], 1e-3, [bad])
    finally:
        tuner.detach()


def test_rates_of_what_learns_in_place(pipe: Any) -> None:
    tuner = vp.attach(pipe, vp.DiffFit(), name="rates")
    try:
        found = groups([tuner], 1e-3, ["norm=1e-4", "attn_out=1e-5", "*.conv_in.bias=1e-6"])
        rate = {id(p): g["lr"] for g in found for p in g["params"]}
        norms = [m.bias for m in pipe.unet.modules() if isinstance(m, torch.nn.GroupNorm | torch.nn.LayerNorm)]
        assert norms and {rate[id(p)] for p in norms} == {1e-4} and rate[id(pipe.unet.conv_in.bias)] == 1e-6
        gammas = [a.gamma for s, a in tuner.adapters.items() if s.role == "attn_out"]
        assert gammas and {rate[id(p)] for p in gammas} == {1e-5}
        assert rate[id(pipe.unet.conv_out.bias)] == 1e-3
    finally:
        tuner.detach()


@pytest.mark.parametrize("train_text, parts", [(False, {"unet"}), (True, {"unet", "text_encoder"})])
def test_adapters_are_only_where_something_learns(config: Config, pipe: Any, train_text: bool,
                                                  parts: set[str]) -> None:  # fmt: skip
    """Roles are found in the autoencoder and the text encoder as well, whose outputs are made before training."""
    family = family_of(pipe)
    for method in ("lora:targets=query value", "lora:targets=diffusers", "lora", "bitfit", "lora:exclude=*.attn2.*"):
        with adapters(replace(config, method=method, train_text=train_text), family, "zqx") as (tuner,):
            assert {site.path.split(".")[0] for site in tuner.sites} == parts
    for within in ("*", "vae.*"):
        bad = replace(config, method=f"lora:targets=query,within={within}", train_text=train_text)
        with pytest.raises(DiffusionError, match="at .*such sites.* learns: give train_text"):
            with adapters(bad, family, "zqx"):
                pass
        assert not vp.tuners(pipe)
    only = replace(config, method="lora:targets=query,within=text_encoder.*", train_text=train_text)
    if train_text:
        with adapters(only, family, "zqx") as (tuner,):
            assert {site.path.split(".")[0] for site in tuner.sites} == {"text_encoder"}
    else:
        with pytest.raises(DiffusionError, match="is at text_encoder"):
            with adapters(only, family, "zqx"):
                pass


def test_text_encoders_learn_on_request(config: Config, pipe: Any) -> None:
    one = plain(config, steps=2, train_text=True)
    run(one, pipe=pipe)
    keys = adapter(one)
    assert any(k.startswith("text_encoder.") for k in keys) and any(k.startswith("unet.") for k in keys)
    assert not any(k.startswith("vae.") for k in keys)
    moved = [k for k, v in keys.items() if k.startswith("text_encoder.") and k.endswith(".b") and v.any()]
    assert moved, "no gradient reached the text encoder"
    assert not (Path(one.cache) / "texts").exists(), "features of a learning encoder were cached"


def test_masked_latents(config: Config, pipe: Any, tmp_path: Path) -> None:
    """What the mask leaves out has no influence."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for i, (h, w) in enumerate([(20, 20), (16, 32), (18, 18)]):
        half = np.zeros((h, w), np.uint8)
        half[:, : w // 2] = 255
        Image.fromarray(half).save(masks / f"{i}.png")
    t = trainer(plain(config, masks=str(masks), buckets=False), pipe, tmp_path)
    try:
        x, mask, *_ = t._batch(0)
        assert mask is not None and mask.shape == (2, 1, 8, 8)
        p, q = torch.randn_like(x), torch.randn_like(x)
        changed = torch.where(mask > 0, p, q)
        assert torch.equal(objective.examples_loss(p, x, mask), objective.examples_loss(changed, x, mask))
    finally:
        t.tuner.detach()


def test_divergence_names_the_images(config: Config, pipe: Any, tmp_path: Path) -> None:
    t = trainer(plain(config), pipe, tmp_path)
    try:
        with torch.no_grad():
            for p in t.learns.values():
                p.fill_(float("nan"))
        with pytest.raises(DivergedError, match=r"update 1, with \d.png, \d.png"):
            t._update(0)
    finally:
        t.tuner.detach()


def test_crops_are_few_and_kept(config: Config, pipe: Any, tmp_path: Path) -> None:
    t = trainer(replace(config, crops=3, flip=False), pipe, tmp_path)
    try:
        generator = torch.Generator().manual_seed(0)
        found = {t._crop(generator) for _ in range(60)}
        assert len(found) == 3 and Crop() not in found
    finally:
        t.tuner.detach()
