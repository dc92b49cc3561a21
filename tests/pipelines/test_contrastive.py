"""Contrastive tuning end to end on a tiny random CLIP model and coloured squares with captions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_clip
import torch
from PIL import Image
from safetensors.torch import load_file

import visionpeft as vp
from visionpeft import cli
from visionpeft.clip import ClipError
from visionpeft.clip.data import read_pairs
from visionpeft.errors import DataError
from visionpeft.pipelines import contrastive
from visionpeft.pipelines.contrastive import Config, batches, run, split

WORDS = ("dark", "dim", "grey", "pale", "bright", "white")


def tiny():
    return tiny_clip.tiny(shake=0, init_logit_bias=-5.0)


@pytest.fixture(autouse=True)
def _model(monkeypatch):
    monkeypatch.setattr(contrastive, "build", lambda name, checkpoint=None: tiny_clip.clip(tiny(), name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Thirty-six squares of six reds, greens or blues, told by two captions each."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i in range(36):
        channel, level = i // 12, i % 6
        pixels = np.zeros((16, 16, 3), np.uint8)
        pixels[..., channel] = 40 * level + 20
        pixels[: i % 12 + 1, :, (channel + 1) % 3] = 200
        Image.fromarray(pixels).save(folder / f"{i}.png")
        for form in ("a {} {} square, {}", "{} {}, {}"):
            rows.append((f"{i}.png", form.format(WORDS[level], ("red", "green", "blue")[channel], i)))
    (folder / "captions.csv").write_text("image,caption\n" + "".join(f'{p},"{t}"\n' for p, t in rows))
    (folder / "captions.json").write_text(json.dumps(
        [{"filepath": f"{i}.png", "title": [t for p, t in rows if p == f"{i}.png"]} for i in range(36)]))  # fmt: skip
    return folder


def config(folder, out, **other):
    base = {"captions": str(folder / "captions.csv"), "batch_size": 12, "piece": 4, "epochs": 2, "held_out": 1 / 3,
            "out": str(out), "warmup": 1, "lr": 2e-2}  # fmt: skip
    return Config(**{**base, **other})


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_the_size_of_pieces_changes_nothing_but_rounding(folder, tmp_path, loss):
    found = []
    for piece in (12, 5):
        out = tmp_path / str(piece)
        result = run(config(folder, out, piece=piece, loss=loss, train="logit_scale logit_bias"))
        found.append((result.losses, load_file(out / "adapter.safetensors")))
    (one, first), (two, second) = found
    assert one == pytest.approx(two, rel=1e-4) and len(one) == 4
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-2, atol=2e-3)


def test_bf16_gives_the_losses_of_fp32_to_its_precision(folder, tmp_path):
    found = [run(config(folder, tmp_path / p, precision=p)).losses for p in ("fp32", "bf16")]
    assert found[0] != found[1] and found[1] == pytest.approx(found[0], rel=0.03)


def test_tuning_lowers_the_loss_and_the_file_brings_the_model_back(folder, tmp_path):
    result = run(config(folder, tmp_path, epochs=15, augment=None))
    assert sum(result.losses[-3:]) < 0.9 * sum(result.losses[:3])
    assert result.images == 24 and result.held_out == 12 and set(result.before) == set(result.after)
    model = tiny()
    vp.load(model, tmp_path / "adapter.safetensors")
    _, held = split(read_pairs(folder / "captions.csv"), 1 / 3, 0)
    assert contrastive.retrieve(tiny_clip.clip(model), held) == result.after


def test_batches_have_each_image_once_an_epoch_with_a_caption_of_its_own(folder):
    pairs = read_pairs(folder / "captions.csv")
    found = batches(pairs, 10, 3, 0)
    assert len(found) == 9
    for epoch in range(3):
        rows = np.concatenate([images for images, _ in found[3 * epoch : 3 * epoch + 3]])
        assert len(set(rows)) == 30
    assert all((pairs.owner[texts] == images).all() for images, texts in found)
    assert {int(t) % 2 for _, texts in found for t in texts} == {0, 1}


def test_held_out_images_are_never_trained_on(folder):
    train, held = split(read_pairs(folder / "captions.csv"), 1 / 3, 0)
    paths = [{s.images.path(i) for i in range(len(s.images))} for s in (train, held)]
    assert len(paths[0]) == 24 and len(paths[1]) == 12 and not paths[0] & paths[1]
    for part in (train, held):
        for text, owner in zip(part.captions, part.owner, strict=True):
            assert text.endswith(f" {part.images.path(int(owner)).rpartition('/')[2][:-4]}")


def test_csv_json_and_sidecar_files_say_the_same(folder, tmp_path):
    table, objects = read_pairs(folder / "captions.csv"), read_pairs(folder / "captions.json")
    assert table.captions == objects.captions and (table.owner == objects.owner).all()
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"number\n {i}")
    assert read_pairs(tmp_path).captions == ["number 0", "number 1", "number 2"]
    (tmp_path / "1.txt").unlink()
    with pytest.raises(DataError, match="1.png: no caption beside it"):
        read_pairs(tmp_path)


def test_bad_input_is_named(folder, tmp_path):
    with pytest.raises(ClipError, match="captions= is empty"):
        run(Config())
    with pytest.raises(ClipError, match="4 of 36 images held out"):
        run(config(folder, tmp_path, held_out=0.1))
    with pytest.raises(ClipError, match="use clip or siglip"):
        run(config(folder, tmp_path, loss="triplet"))
    with pytest.raises(ClipError, match="the loss is (nan|inf)"):
        run(config(folder, tmp_path, lr=1e30, method="full", epochs=6))
    for text, message in (("a,b\n1,2\n", "expected one of"), ("image,caption\n", "no image with a caption"),
                          ("image,caption\nx.png,\n", "empty caption of .*x.png")):  # fmt: skip
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            read_pairs(tmp_path / "bad.csv")


def test_the_command_prints_retrieval_before_and_after(folder, tmp_path, capsys):
    arguments = ["contrast", "--captions", str(folder / "captions.csv"), "--batch-size", "12", "--epochs", "1"]
    assert cli.main([*arguments, "--held-out", "0.34", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "text to image r@5" in shown and "difference" in shown
    page = (tmp_path / "report.html").read_text()
    assert "<td>text to image r@5</td>" in page and "<svg" in page
