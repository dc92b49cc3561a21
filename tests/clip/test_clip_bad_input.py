"""Bad input of CLIP jobs, one test a kind: each error names what is wrong, where, and what there is instead."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from open_clip.model import CustomTextCLIP
from PIL import Image
from tiny_clip import PREPARE, tiny, tokenizer

import visionpeft as vp
from visionpeft.clip import ClipError, read_templates, zero_shot_weights
from visionpeft.clip import model as models
from visionpeft.clip.data import load_images, read_pairs, read_split
from visionpeft.clip.features import image_features
from visionpeft.errors import AdapterFileError, DataError, SiteError, VisionPEFTError
from visionpeft.pipelines import contrastive, few_shot, zero_shot


@pytest.fixture
def folder(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path


def test_unknown_class_names(folder):
    (folder / "names.json").write_text(json.dumps({"ant": "an ant", "bee": "a bee", "gnu": "a gnu"}))
    with pytest.raises(ClipError, match=r"names.json: unknown class 'gnu'; the data have 2 classes: ant, bee"):
        load_images(f"folder-all:{folder / 'images'}", classes=str(folder / "names.json"))
    (folder / "names.txt").write_text("ant\n")
    with pytest.raises(ClipError, match=r"names.txt: 1 names for 2 classes: ant, bee"):
        load_images(f"folder-all:{folder / 'images'}", classes=str(folder / "names.txt"))
    with pytest.raises(ClipError, match="class 'ant' is listed more than once"):
        zero_shot_weights(tiny(), tokenizer, ["ant", "bee", "ant"], ["{}"])


def test_a_class_list_in_another_order_would_swap_labels(folder):
    """Of the data's own names; others may be anything, and an object says by itself what is what."""
    for names in (["bee", "ant"], ["Bee", "wasp"]):
        for file, text in (("names.txt", "\n".join(names)), ("names.json", json.dumps(names))):
            (folder / file).write_text(text)
            with pytest.raises(ClipError, match=rf"{file}: name 1 is '[bB]ee', which is class 2 .* class 1 is 'ant'"):
                load_images(f"folder-all:{folder / 'images'}", classes=str(folder / file))
    (folder / "names.json").write_text('{"ant": "bee", "bee": "ant"}')
    assert load_images(f"folder-all:{folder / 'images'}", classes=str(folder / "names.json")).classes == ["bee", "ant"]
    (folder / "names.json").write_text('"ant"')
    with pytest.raises(ClipError, match=r"names.json: no names for 2 classes"):
        load_images(f"folder-all:{folder / 'images'}", classes=str(folder / "names.json"))


def test_a_mark_at_the_beginning_of_a_file_is_no_part_of_a_name(folder):
    def write(name, text):
        (folder / name).write_text(text, encoding="utf-8-sig")

    write("names.txt", "an ant\na bee\n")
    write("names.json", '["an ant", "a bee"]')
    for file in ("names.txt", "names.json"):
        found = load_images(f"folder-all:{folder / 'images'}", classes=str(folder / file))
        assert found.classes == ["an ant", "a bee"]
    write("captions.csv", "image,caption\nimages/ant/0.png,an ant\n")
    write("captions.json", '[{"image": "images/ant/0.png", "caption": "an ant"}]')
    for image in (folder / "images" / "bee").iterdir():
        write(f"images/bee/{image.stem}.txt", "an ant")
    for source in ("captions.csv", "captions.json", "images/bee"):
        assert set(read_pairs(folder / source).captions) == {"an ant"}
    write("templates.json", '["a {}."]')
    assert read_templates(str(folder / "templates.json")) == ["a {}."]


def test_captions_that_would_lose_their_end_or_are_no_captions_are_named(folder):
    (folder / "captions.csv").write_text("image,caption\nimages/ant/0.png,an ant\nimages/ant/1.png,ants, many\n")
    with pytest.raises(DataError, match=r"captions.csv:3: more fields than columns .*needs quotes"):
        read_pairs(folder / "captions.csv")
    (folder / "captions.csv").write_text("filepath\ttitle\nimages/ant/0.png\tants, many\n")  # as open_clip has them
    assert read_pairs(folder / "captions.csv").captions == ["ants, many"]
    for text in ('{"a.png": "an ant"}', '["a.png"]', "[1]"):
        (folder / "captions.json").write_text(text)
        with pytest.raises(DataError, match=r"captions.json: expected a JSON list of objects such as"):
            read_pairs(folder / "captions.json")


@pytest.mark.parametrize("spec, message", [
    ("opnai", "template 'opnai' .*the named sets are openai, simple, coop"),
    ("coop:birds", "CoOp has none for it; it has imagenet, caltech101"),
    ("nowhere.json", "nowhere.json: cannot be read"),
    ("a {} and a {}.", "write {} or {c} once"),
])  # fmt: skip
def test_unknown_templates(spec, message):
    with pytest.raises(ClipError, match=message):
        read_templates(spec)


def test_tokens_beyond_the_context():
    with pytest.raises(ClipError, match=r"1 of 2 texts have more tokens than the context of 32: 'a a .*shorten the"):
        zero_shot_weights(tiny(), tokenizer, ["cat", "a " * 40], ["{}"])


@pytest.mark.parametrize("tower, targets", [("image", "query"), ("text", "conv"), ("text", "patch_embed")])
def test_a_tower_without_the_role_lists_those_that_it_has(tower, targets):
    trunk = dict(image_size=32, timm_model_name="test_convnext", timm_pool="avg", timm_proj="linear")
    model = tiny(trunk, cls=CustomTextCLIP)
    with pytest.raises(SiteError, match=rf"no site matches '{targets}' among .* Roles here: .*norm"):
        vp.attach(model, vp.LoRA(rank=2, targets=targets, tower=tower))
    assert not vp.tuners(model)
    with pytest.raises(SiteError, match="tower='vision': this model has none of that name; it has image and text"):
        vp.attach(model, vp.LoRA(rank=2, targets="norm", tower="vision"))


@pytest.mark.parametrize("name, checkpoint, right", [
    ("ViT-B-32", "openai", "ViT-B-32-quickgelu"), ("ViT-L-14-quickgelu", "laion2b_s32b_b82k", "ViT-L-14"),
])  # fmt: skip
def test_quickgelu_mismatch_names_the_right_configuration(name, checkpoint, right, monkeypatch):
    if right == "ViT-L-14":  # whether the tag is listed for that model is open_clip's matter
        monkeypatch.setattr(models, "_wants_quick_gelu", lambda *_: False)
    with pytest.raises(ClipError, match=f"trained with (Quick)?GELU, and {name} has the other .* Use {right}$"):
        models.build(name, checkpoint)


def test_an_adapter_of_another_tower(tmp_path):
    """In a flat CLIP the text tower's paths are those of a lone image tower, so that names alone would fit."""
    lone, whole = tiny(), tiny()
    vp.attach(lone.visual, vp.LoRA(rank=2, targets="query")).save(tmp_path / "lone.safetensors")
    vp.attach(whole, vp.LoRA(rank=2, targets="query", tower="image")).save(tmp_path / "image.safetensors")
    model = tiny()
    with pytest.raises(AdapterFileError, match="made for another model, a VisionTransformer of open_clip"):
        vp.load(model, tmp_path / "lone.safetensors")
    for other in (model.visual, model.transformer):
        with pytest.raises(AdapterFileError, match=r"a CLIP of open_clip: visual.transformer.resblocks.0.attn:query"):
            vp.load(other, tmp_path / "image.safetensors")
    assert not vp.tuners(model)
    vp.load(model, tmp_path / "image.safetensors")


def test_an_image_file_that_is_gone_is_named_with_the_line_that_lists_it(folder):
    (folder / "captions.csv").write_text("image,caption\nimages/ant/0.png,an ant\nimages/ant/9.png,no ant\n")
    with pytest.raises(DataError, match=r"9.png \(listed in .*captions.csv:3\): no such image file"):
        read_pairs(folder / "captions.csv")
    part = [["images/ant/0.png", 0, "ant"], ["images/bee/7.png", 1, "bee"]]
    (folder / "split.json").write_text(json.dumps({"train": part, "val": [], "test": part[:1]}))
    with pytest.raises(DataError, match=r"7.png \(listed in .*split.json\): no such image file"):
        read_split(folder / "split.json")
    images = load_images(f"folder-all:{folder / 'images'}").images
    (folder / "images" / "bee" / "1.png").unlink()
    with pytest.raises(DataError, match="1.png.*: no such image file"):
        image_features(tiny(), images, PREPARE)


@pytest.mark.parametrize("run, message", [
    (lambda out: few_shot.run(few_shot.Config(method="clip_laura", out=out)), "unknown method 'clip_laura'"),
    (lambda out: few_shot.run(few_shot.Config(method="linear", out=out)), "CLIP has none: use linear_probe"),
    (lambda out: few_shot.run(few_shot.Config(shots=0, out=out)), "shots=0: at least 1"),
    (lambda out: few_shot.run(few_shot.Config(iterations=-1, shots=1, out=out)), "expected at least one update"),
    (lambda out: zero_shot.run(zero_shot.Config(adapter="none.safetensors", out=out)), "none.safetensors"),
    (lambda out: zero_shot.run(zero_shot.Config(model="nano_clap", out=out)), "open_clip has no model 'nano_clap'"),
    (lambda out: contrastive.run(contrastive.Config(captions="x", precision="fp16", out=out)), "half precision needs"),
    (lambda out: contrastive.run(contrastive.Config(captions="nowhere", out=out)), "nowhere: captions not found"),
])  # fmt: skip
def test_misspelt_settings_of_the_jobs(run, message, tmp_path, monkeypatch):
    small = load_images("digits?test=20")
    monkeypatch.setattr(zero_shot, "load_images", lambda *_: small)
    with torch.no_grad(), pytest.raises(VisionPEFTError, match=message):
        run(str(tmp_path))


@pytest.mark.parametrize("job, settings", [
    (few_shot, few_shot.Config(shots=1)), (zero_shot, zero_shot.Config(data=("digits?test=20",))),
    (contrastive, contrastive.Config(captions="x")),
])  # fmt: skip
def test_several_processes_would_each_do_it_all(job, settings, monkeypatch):
    monkeypatch.setattr(job, "make_accelerator", lambda *_: SimpleNamespace(num_processes=4, device="cpu"))
    with pytest.raises(ClipError, match="one process, and here are 4: start it without `accelerate launch`"):
        job.run(settings)
