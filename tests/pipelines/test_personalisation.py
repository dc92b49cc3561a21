"""`visionpeft personalise` and `generate`: kills, bad input, the account, what is drawn, scores."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")

import tiny_pipelines  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import visionpeft as vp  # noqa: E402
from visionpeft.cli import main  # noqa: E402
from visionpeft.data import scenes  # noqa: E402
from visionpeft.data.subjects import read_subject  # noqa: E402
from visionpeft.diffusion import DiffusionError, load_pipeline  # noqa: E402
from visionpeft.diffusion.scores import (  # noqa: E402
    LIVE_PROMPTS,
    OBJECT_PROMPTS,
    Encoder,
    among,
    clip_encoder,
    image_encoder,
    scores,
)
from visionpeft.errors import VisionPEFTError  # noqa: E402
from visionpeft.pipelines.generation import draw, subject_of  # noqa: E402
from visionpeft.pipelines.personalisation import Config, bundled, run  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Stable Diffusion in a folder."""
    folder = tmp_path_factory.mktemp("base")
    tiny_pipelines.sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(base: str, tmp_path: Path) -> Config:
    folder = tmp_path / "own"
    folder.mkdir()
    for i in range(2):
        values = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{i}.png")
    return Config(base=base, images=str(folder), out=str(tmp_path / "run"), cache=str(tmp_path / "cache"), steps=3,
                  inference_steps=2, method="lora:rank=2", checkpoint_seconds=0.0, prompt="a {}", previews=("a {}",),
                  class_name="c", lr=1e-2)  # fmt: skip


@pytest.fixture(scope="module")
def pipe(base: str) -> Any:
    return load_pipeline(base)


def test_account_and_files(config: Config, pipe: Any) -> None:
    (Path(config.images) / "0.txt").write_text("a {} at b")
    (Path(config.images) / "1.txt").write_text("a c")
    told: list[str] = []
    result = run(config, told.append, pipe=pipe)
    tuner = vp.load(pipe, config.folder / "adapter.safetensors")
    parameters = tuner.num_parameters
    tuner.detach()
    assert told[:4] == ["images: 2, captions matched: 2, class images: 0", "buckets: 16x16 (2)",
                        "prompt: 'a zqx c at b'", "steps: 3, each of 1 images"]  # fmt: skip
    assert f"{parameters:,} parameters" in told[4] and "memory expected" in told[5]
    assert "1 captions do not have the token 'zqx'" in told[6]
    assert result.account == told[:7] and result.parameters == parameters
    assert subject_of(str(config.folder / "adapter.safetensors")) == "zqx c"
    page = (config.folder / "report.html").read_text()
    assert page.count("<img") == 1 and "memory expected" in page and "http" not in page.replace("http://www.w3", "")


def test_the_kohya_file_beside(config: Config, pipe: Any) -> None:
    run(config, pipe=pipe)
    tuner = vp.load(pipe, config.folder / "adapter.safetensors")
    generator = torch.Generator()
    wanted = pipe("a zqx c", num_inference_steps=2, generator=generator.manual_seed(1), output_type="pt").images
    tuner.detach()
    other = load_pipeline(config.base)
    other.load_lora_weights(str(config.folder), weight_name="adapter_kohya.safetensors")
    found = other("a zqx c", num_inference_steps=2, generator=generator.manual_seed(1), output_type="pt").images
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    again = replace(config, method="difffit", out=f"{config.out}_difffit")
    (note,) = run(again, pipe=pipe).notes
    assert note.startswith("no adapter_kohya.safetensors:")
    assert not (again.folder / "adapter_kohya.safetensors").exists()


def test_a_black_preview_is_told(config: Config, pipe: Any, monkeypatch: Any) -> None:
    black = Image.new("RGB", (16, 16), (3, 2, 1))
    monkeypatch.setattr("visionpeft.diffusion.families.Family.draw", lambda *a, **k: [black])
    told: list[str] = []
    result = run(config, told.append, pipe=pipe)
    assert len(result.notes) == 1 and "at step 3 is black" in result.notes[0] and f"NOTE: {result.notes[0]}" in told


@pytest.mark.parametrize("fields, message", [
    ({"prior": 2, "class_name": None}, "give class_name"),
    ({"steps": 0}, "steps=0"),
    ({"method": "nothing"}, "unknown method 'nothing'"),
    ({"token": "b"}, "is a word already"),
    ({"token": "bad"}, "3 pieces"),
    ({"prompt": "a " * 30}, "text encoder reads 24"),
    ({"images": "bundled:nobody"}, "choose one of bee, cow, frog, imp, robo"),
    ({"images": "/nowhere"}, "no such folder"),
    ({"resolution": 18}, "multiples of 4"),
    ({"method": "textual_inversion"}, "together with a method"),
    ({"word_vectors": 1, "token": "b"}, "'b' is a word of this tokenizer already"),
    ({"min_snr": 5.0, "schedule": "linear"}, "expected constant or cosine"),
    ({"rates": ("quary=1",)}, "'quary' fits nothing"),
    ({"score_images": 1, "dino": "nano_vit", "clip_model": "nobody"}, "nobody"),
])  # fmt: skip
def test_bad_settings(config: Config, pipe: Any, fields: dict[str, Any], message: str) -> None:
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    with pytest.raises(VisionPEFTError, match=message):
        run(replace(config, **fields), pipe=pipe)
    after = pipe.unet.state_dict()
    assert not config.folder.exists(), "the folder is taken by settings that were refused"
    assert not vp.tuners(pipe) and before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_bad_bases(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.safetensors").write_bytes(b"")
    (tmp_path / "x.ckpt").write_bytes(b"")
    for given, message in (((str(tmp_path / "empty"),), "holds no diffusers pipeline"),
                           ((str(tmp_path / "none"),), "no such folder or file"),
                           ((str(tmp_path / "x.ckpt"),), "only .safetensors"),
                           ((str(tmp_path / "x.safetensors"),), "needs base_config")):  # fmt: skip
        with pytest.raises(DiffusionError, match=message):
            load_pipeline(*given)


def test_a_checkpoint_of_another_architecture(base: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}, tmp_path / "vit.safetensors")
    with pytest.raises(DiffusionError, match="vit.safetensors is no checkpoint of .*'s architecture"):
        load_pipeline(str(tmp_path / "vit.safetensors"), base)


def test_draw(config: Config, pipe: Any, base: str) -> None:
    """As the pipeline itself draws with the adapter; strength 0 is the base."""
    run(config, pipe=pipe)
    path = str(config.folder / "adapter.safetensors")
    told: list[str] = []
    found = draw(base, {path: 1.0}, ["a {} b"], count=2, seed=4, steps=2, watch=told.append)
    tuner = vp.load(pipe, path)
    wanted = [pipe("a zqx c b", num_inference_steps=2, guidance_scale=7.5,
                   generator=torch.Generator().manual_seed(4 + i)).images[0] for i in range(2)]  # fmt: skip
    assert [(p, i.tobytes()) for p, i in found] == [("a zqx c b", i.tobytes()) for i in wanted] and not told
    tuner.detach()
    plain = pipe("a", num_inference_steps=2, generator=torch.Generator().manual_seed(4)).images[0]
    ((_, none),) = draw(base, {path: 0.0}, ["a"], seed=4, steps=2)
    assert none.tobytes() == plain.tobytes()


def test_what_was_trained_at_another_resolution_is_drawn_at_it(config: Config, pipe: Any, base: str) -> None:
    large = replace(config, resolution=32, steps=1)
    run(large, pipe=pipe)
    assert Image.open(large.folder / "previews" / "000001_0.png").size == (32, 32)
    path = str(large.folder / "adapter.safetensors")
    ((_, own),), ((_, asked),) = (draw(base, {path: 1.0}, ["a"], steps=1, side=side) for side in (None, 16))
    assert own.size == (32, 32) and asked.size == (16, 16)


class Killed(Exception):
    pass


def test_a_new_word_learns_together_with_a_method(config: Config, pipe: Any, tmp_path: Path) -> None:
    """Pivotal tuning: both move, a killed run goes on to the same bits, and diffusers reads the word."""
    pivotal = replace(config, word_vectors=2, train_text=True, ema=0.9, prompt="a {} b", score_images=0)
    told: list[str] = []
    result = run(pivotal, told.append, pipe=pipe)
    assert told[5] == "new word: '<subject>', 2 vectors, starting at 'c', lr 0.001 unless rates say otherwise"
    assert len(pipe.tokenizer) == 48 and not vp.tuners(pipe), "the word was left behind"
    ((token, vectors),) = load_file(pivotal.folder / "learned_embeds.safetensors").items()
    (c,) = pipe.tokenizer("c", add_special_tokens=False).input_ids
    start = pipe.text_encoder.get_input_embeddings().weight[[c, c]].detach()
    assert token == "<subject>" and vectors.shape == (2, 16) and 1e-4 < float((vectors - start).abs().max()) < 1e-2
    state = load_file(pivotal.folder / "adapter.safetensors")
    assert result.parameters == 32 + sum(t.numel() for t in state.values())
    for part in ("unet.", "text_encoder."):
        assert any(t.any() for key, t in state.items() if key.startswith(part) and key.endswith(".b"))

    def kill(done: int, steps: int, loss: float) -> None:
        if done == 2:
            raise Killed

    broken = replace(pivotal, out=str(tmp_path / "broken"))
    with pytest.raises(Killed):
        run(broken, progress=kill, pipe=pipe)
    run(broken, pipe=pipe)
    for name in ("adapter.safetensors", "learned_embeds.safetensors"):
        a, b = (load_file(folder / name) for folder in (pivotal.folder, broken.folder))
        assert all(torch.equal(a[key], b[key]) for key in a)

    path = pivotal.folder / "adapter.safetensors"
    ((prompt, found),) = draw(config.base, {str(path): 1.0}, ["a {} b"], seed=4, steps=2)
    other = load_pipeline(config.base)
    vp.load(other, path)
    other.load_textual_inversion(str(pivotal.folder / "learned_embeds.safetensors"))
    wanted = other("a <subject> c b", num_inference_steps=2, generator=torch.Generator().manual_seed(4)).images[0]
    assert prompt == "a <subject> c b"
    assert np.abs(np.asarray(found, dtype=int) - np.asarray(wanted, dtype=int)).max() <= 1, "diffusers reads other rows"
    with pytest.raises(DiffusionError, match="25 tokens and the text encoder reads 24"):
        draw(config.base, {str(path): 1.0}, ["{} " + "a " * 20], steps=1)
    (pivotal.folder / "learned_embeds.safetensors").unlink()
    with pytest.raises(DiffusionError, match=r"learned_embeds.safetensors is not there: it has the word '<subject>'"):
        draw(config.base, {str(path): 1.0}, ["a"], steps=1)


def test_a_new_word_needs_one_text_encoder(config: Config) -> None:
    with pytest.raises(DiffusionError, match="StableDiffusionXLPipeline has 2"):
        run(replace(config, word_vectors=1), pipe=tiny_pipelines.sdxl())


def test_an_adapter_of_another_base(config: Config, pipe: Any, tmp_path: Path) -> None:
    run(config, pipe=pipe)
    path = str(config.folder / "adapter.safetensors")
    other = tiny_pipelines.sd()
    with torch.no_grad():
        other.unet.conv_in.bias.add_(1)
    other.save_pretrained(tmp_path / "other")
    told: list[str] = []
    draw(str(tmp_path / "other"), {path: 1.0}, ["a"], steps=1, watch=told.append)
    assert len(told) == 1 and "whose weights are others" in told[0]
    tiny_pipelines.sdxl().save_pretrained(tmp_path / "xl")
    with pytest.raises(VisionPEFTError, match="down_blocks"):
        draw(str(tmp_path / "xl"), {path: 1.0}, ["a"], steps=1)


def test_commands(config: Config, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    told = ["--base", config.base, "--images", config.images, "--out", config.out, "--cache", config.cache, "--steps",
            "2", "--inference-steps", "2", "--method", "krona:a1=2,a2=2", "--prompt", "a {}", "--previews",
            "a {}"]  # fmt: skip
    assert main(["personalise", *told]) == 0
    assert "images: 2, captions matched: 0" in capsys.readouterr().out
    path = Path(config.out) / "adapter.safetensors"
    assert main(["generate", "a {}", "b", "--base", config.base, "--adapters", f"{path}=0.5", "--inference-steps", "1",
                 "--count", "2", "--out", "drawn"]) == 0  # fmt: skip
    assert sorted(p.name for p in Path("drawn").iterdir()) == ["000.png", "001.png", "002.png", "003.png", "sheet.png"]
    assert main(["personalise", *told, "--token", "bad"]) == 2
    assert "token is None there and 'bad' here" in capsys.readouterr().err


@pytest.mark.slow
def test_sigkill(config: Config, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "visionpeft.cli", "personalise", "--base", config.base, "--images", config.images,
                "--out", str(out), "--cache", config.cache, "--steps", "30", "--inference-steps", "2", "--method",
                "lora:rank=2,dropout=0.1", "--prompt", "a {}", "--previews", "a {}", "--ema", "0.9", "--flip",
                "--checkpoint-seconds", "0"]  # fmt: skip

    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    process = subprocess.Popen(command(killed), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    while not (killed / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(torch.load(killed / "checkpoint.pt", weights_only=True)["losses"])
    assert 0 < done < 30, "the run was not killed in the middle"
    subprocess.run(command(killed), cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    a, b = (load_file(folder / "adapter.safetensors") for folder in (whole, killed))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert (whole / "metrics.jsonl").read_text() == (killed / "metrics.jsonl").read_text()
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, killed)]
    assert results[0]["loss"] == results[1]["loss"] and results[0]["segments"] == results[1]["segments"] == [30]


@pytest.mark.slow
def test_two_processes_do_the_work_of_one(config: Config, tmp_path: Path) -> None:
    told = ["--base", config.base, "--images", config.images, "--cache", config.cache, "--steps", "3", "--accumulation",
            "2", "--inference-steps", "2", "--method", "lora:rank=2", "--prompt", "a {}", "--previews",
            "a {}"]  # fmt: skip
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port),
              str(ROOT / "scripts" / "train_personalisation.py")]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for out, start in (("one", ["visionpeft.cli", "personalise"]), ("two", launch)):
        command = [sys.executable, "-m", *start, *told, "--out", str(tmp_path / out)]
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
    a, b = (load_file(tmp_path / name / "adapter.safetensors") for name in ("one", "two"))
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-4, atol=1e-6)
    first, second = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two"))
    for x, y in zip(first, second, strict=True):
        assert abs(json.loads(x)["loss"] - json.loads(y)["loss"]) < 1e-5


# ---- scores and the bundled subjects


def test_scores() -> None:
    """Encoders that read a feature off the pixels; cosines written out."""
    def images(pictures: Any) -> torch.Tensor:
        x = torch.tensor([p.getpixel((0, 0)) for p in pictures], dtype=torch.float64)
        return x / x.norm(dim=1, keepdim=True)

    def texts(words: Any) -> torch.Tensor:
        table = {"red": [1.0, 0, 0], "green": [0, 1.0, 0]}
        return torch.tensor([table[w] for w in words], dtype=torch.float64)

    drawn = [Image.new("RGB", (2, 2), c) for c in ((255, 0, 0), (30, 40, 0))]
    real = [Image.new("RGB", (2, 2), c) for c in ((0, 200, 0), (0, 0, 9), (100, 0, 0))]
    found = scores(drawn, ["red", "green"], real, Encoder(images), Encoder(images, texts))
    assert abs(found["dino"] - (0 + 0 + 1 + 0.8 + 0 + 0.6) / 6) < 1e-12 and found["clip_i"] == found["dino"]
    assert abs(found["clip_t"] - (1 + 0.8) / 2) < 1e-12
    assert abs(among(images([*real, real[0]])) - 2 / 12) < 1e-12


@pytest.mark.parametrize("words", [0, 1])
def test_a_run_is_scored_before_and_after(config: Config, pipe: Any, monkeypatch: Any, words: int) -> None:
    """On images of the base and of base plus adapter, each drawn again here; a word that learns is new to the base."""
    pytest.importorskip("timm"), pytest.importorskip("open_clip")
    monkeypatch.setattr("visionpeft.diffusion.scores.OBJECT_PROMPTS", ("a {}", "{} b"))
    scored = replace(config, score_images=2, dino="nano_vit", clip_model="nano_clip", clip_checkpoint=None,
                     word_vectors=words, guidance=2.0, seed=3)  # fmt: skip
    result = run(scored, pipe=pipe)
    dino, clip = image_encoder("nano_vit"), clip_encoder("nano_clip")
    real = [p.open() for p in read_subject(config.images)]
    path = str(config.folder / "adapter.safetensors")
    for found, adapters, name in ((result.before, {}, "c" if words else "zqx c"), (result.after, {path: 1.0}, "{}")):
        images = [draw(config.base, adapters, [p.replace("{}", name)], seed=3 + i, steps=2, guidance=2.0)[0][1]
                  for i, p in enumerate(["a {}", "a {}", "{} b", "{} b"])]  # fmt: skip
        wanted = scores(images, ["a c", "a c", "c b", "c b"], real, dino, clip)
        assert found.keys() == wanted.keys() and all(abs(found[k] - wanted[k]) < 1e-4 for k in wanted)
    assert abs(result.real["dino"] - among(dino.images(real))) < 1e-6
    assert (config.folder / "sheet.png").exists() and "CLIP-T" in (config.folder / "report.html").read_text()


def test_dreambench_prompts_are_the_published_ones() -> None:
    path = ROOT.parent / "shared" / "data" / "subjects" / "prompts_and_classes.txt"
    if not path.exists():
        pytest.skip("the list of prompts is not beside the repository")
    lines = [line for line in path.read_text().splitlines() if line.strip().startswith("'")]
    published = [line.strip().strip(",").split("'.format")[0].strip("'").replace("{0} {1}", "{}") for line in lines]
    assert published == [*OBJECT_PROMPTS, *LIVE_PROMPTS]


def test_bundled_subjects() -> None:
    for name in scenes.SUBJECTS:
        pictures = bundled(name), bundled(name, "test")
        assert [len(p) for p in pictures] == [5, 5]
        assert len({p.digest for part in pictures for p in part}) == 10
        places = [p.caption.removeprefix("a photo of a {} ") for part in pictures for p in part if p.caption]
        assert len(set(places)) == 10 and set(places) <= {*scenes.BACKGROUNDS, *scenes.PLAIN}
        assert all(p.open().size == (32, 32) for part in pictures for p in part)


def test_single_file(base: str, tmp_path: Path) -> None:
    """One file with the original names, and a folder of which only configs and the tokenizer are read."""
    import shutil

    import single_file

    wanted = tiny_pipelines.sd()
    single_file.write(wanted, tmp_path / "model.safetensors")
    configs = tmp_path / "configs"
    shutil.copytree(base, configs, ignore=shutil.ignore_patterns("*.safetensors"))
    found = load_pipeline(str(tmp_path / "model.safetensors"), str(configs))
    for name in ("unet", "vae", "text_encoder"):
        state = getattr(found, name).state_dict()
        for key, value in getattr(wanted, name).state_dict().items():
            assert torch.equal(state[key], value), (name, key)
    with pytest.raises(DiffusionError, match=r"model\.safetensors is no checkpoint of"):
        other = tmp_path / "other"
        tiny_pipelines.sdxl().save_pretrained(other)
        load_pipeline(str(tmp_path / "model.safetensors"), str(other))
