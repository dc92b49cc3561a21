"""One file per adapter: whole or not at all, safe to open, and never in the wrong model unnoticed."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import struct
import warnings

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import Net, image, vit
from torch import nn
from traces import assert_same, snapshot

import visionpeft as vp
from visionpeft.errors import AdapterFileError
from visionpeft.methods.points import PointMethod
from visionpeft.state import FORMAT, read_header


def adapted(method: object = "lora", model: nn.Module | None = None, **more: object) -> tuple[nn.Module, vp.Tuner]:
    torch.manual_seed(0)
    model = vit() if model is None else model
    tuner = vp.attach(model, method, train="head", **more)
    with torch.no_grad():
        for p in tuner.parameters():
            nn.init.normal_(p, std=0.1)
    return model, tuner


def same_base() -> nn.Module:
    torch.manual_seed(0)
    return vit()


ELSEWHERE = ("textual_inversion",)  # no words in a ViT; tests/reference/test_textual_inversion.py


@pytest.mark.parametrize(
    "key", [key for key, m in vp.METHODS.items() if not issubclass(m, PointMethod) and key not in ELSEWHERE]
)
def test_round_trip(key, tmp_path):
    model, tuner = adapted(vp.KronA(a1=4, a2=6) if key == "krona" else key)
    tuner.save(tmp_path / "cat.safetensors", licence="MIT", classes=["a", "b"])
    other = same_base()
    before = snapshot(other)
    loaded = vp.load(other, tmp_path / "cat.safetensors")
    assert (loaded.name, loaded.method, loaded.num_parameters) == ("cat", tuner.method, tuner.num_parameters)
    assert [str(s) for s in loaded.sites] == [str(s) for s in tuner.sites]
    x = image()
    assert torch.equal(other(x), model(x))
    assert all(p.requires_grad for p in loaded.parameters())
    if not key.startswith("binary"):  # of those a file has the bits only
        assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in tuner.state_dict().items())
    loaded.save(tmp_path / "again.safetensors", licence="MIT", classes=["a", "b"])
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "cat.safetensors").read_bytes()
    loaded.detach()
    assert_same(before, other)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(min_size=1).filter(lambda k: k not in ("self", "path")), json_values, max_size=4))
def test_metadata_of_any_json_come_back(tmp_path, metadata):
    net = Net()
    tuner = vp.attach(net, "linear")
    path = tmp_path / "m.safetensors"
    try:
        tuner.save(path, **metadata)
    except AdapterFileError:  # text that UTF-8 cannot hold
        assert any("\\ud" in json.dumps([k, v]) for k, v in metadata.items())
    else:
        assert read_header(path)["metadata"] == metadata


def test_metadata_that_are_no_json_are_refused_before_writing(tmp_path):
    _, tuner = adapted()
    for value in (object(), torch.zeros(1), {1, 2}):
        with pytest.raises(AdapterFileError, match="JSON"):
            tuner.save(tmp_path / "a.safetensors", thing=value)
    assert os.listdir(tmp_path) == []


def test_scale_and_fields_are_stored_and_targets_are_not_needed(tmp_path):
    method = vp.LoRA(rank=3, alpha=6, rslora=True, targets=lambda s: s.path == "blocks.1.attn.qkv" and s.role == "key")
    model, tuner = adapted(method)
    tuner.scale = 0.25
    tuner.save(tmp_path / "a.safetensors")
    other = same_base()
    loaded = vp.load(other, tmp_path / "a.safetensors", name="z")
    assert loaded.scale == 0.25 and loaded.name == "z" and loaded.method.rank == 3 and loaded.method.rslora
    assert [str(s) for s in loaded.sites] == ["blocks.1.attn.qkv:key"]
    x = image()
    assert torch.equal(other(x), model(x))


def test_names_from_files(tmp_path):
    _, tuner = adapted()
    for name in ("v1.5.safetensors", "training.safetensors"):
        tuner.save(tmp_path / name)
    model = same_base()
    assert vp.load(model, tmp_path / "v1.5.safetensors").name == "v1_5"
    before = snapshot(model)
    with pytest.raises(vp.VisionPEFTError, match="'v1_5' is attached already"):
        vp.load(model, tmp_path / "v1.5.safetensors")
    assert_same(before, model)


def test_an_adapter_is_small_and_carries_nothing_of_the_base(tmp_path):
    _, tuner = adapted(vp.LoRA(rank=1))
    tuner.save(tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        sizes = [math.prod(file.get_slice(k).get_shape()) for k in file.keys()]
    assert sum(sizes) == tuner.num_parameters + 48 * 10 + 10


def test_a_merged_or_resting_adapter_saves_the_same_file(tmp_path):
    _, tuner = adapted()
    tuner.save(tmp_path / "a.safetensors")
    with tuner.disabled():
        tuner.save(tmp_path / "b.safetensors")
    tuner.merge()
    tuner.save(tmp_path / "c.safetensors")
    a, b, c = ((tmp_path / f"{n}.safetensors").read_bytes() for n in "abc")
    assert a == b == c


def test_into_another_dtype(tmp_path):
    _, tuner = adapted()
    tuner.save(tmp_path / "a.safetensors")
    other = same_base().bfloat16()
    loaded = vp.load(other, tmp_path / "a.safetensors")
    assert other.head.weight.dtype == torch.bfloat16
    assert {a.a.dtype for a in loaded.adapters.values()} == {torch.float32}
    other(image().bfloat16())


# ---- damaged and foreign files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, tuner = adapted(vp.LoRA(rank=1))
    path = tmp_path_factory.mktemp("good") / "a.safetensors"
    tuner.save(path)
    return path.read_bytes()


RECEIVER = vit()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_truncated_file_is_a_named_error_and_leaves_no_trace(good, tmp_path, data):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
    before = snapshot(RECEIVER)
    with pytest.raises(AdapterFileError, match="cut.safetensors"):
        vp.load(RECEIVER, path)
    assert_same(before, RECEIVER)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_byte_of_the_header_is_a_named_error_or_harmless(good, tmp_path, data):
    length = 8 + struct.unpack("<Q", good[:8])[0]
    damaged = bytearray(good)
    damaged[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "odd.safetensors"
    path.write_bytes(bytes(damaged))
    before = snapshot(RECEIVER)
    try:
        vp.load(RECEIVER, path).detach()
    except vp.VisionPEFTError:
        pass
    assert_same(before, RECEIVER)


def with_header(good: bytes, **changes: object) -> bytes:
    tensors = safetensors.torch.load(good)
    header = json.loads(json.loads(good[8 : 8 + struct.unpack("<Q", good[:8])[0]])["__metadata__"]["visionpeft"])
    header.update(changes)
    header = {k: v for k, v in header.items() if v is not None}
    return safetensors.torch.save(tensors, {"visionpeft": json.dumps(header)})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(format=FORMAT + 1), rf"format {FORMAT + 1} is newer.*{FORMAT}"),
        (dict(method="dora2"), "'dora2' is not known here; known: .*lora"),
        (dict(fields={"rank": 1, "colour": 2}), "lora has no field colour"),
        (dict(sites=None), "lacks sites"),
        (dict(backbone=None, tensors=None), "lacks backbone, tensors"),
    ],
)
def test_headers_of_other_times_say_what_differs(good, tmp_path, changes, says):
    path = tmp_path / "a.safetensors"
    path.write_bytes(with_header(good, **changes))
    before = snapshot(RECEIVER)
    with pytest.raises(AdapterFileError, match=says):
        vp.load(RECEIVER, path)
    assert_same(before, RECEIVER)


@pytest.mark.parametrize(
    "changes",
    [dict(format=None), dict(fields=[1]), dict(fields={"rank": "x"}), dict(fields={"rank": 0}),
     dict(sites=3), dict(sites=[{}]), dict(tensors=[{"path": 1}]), dict(method=["lora"]), dict(backbone=[]),
     dict(scale="strong"), dict(sites=[{"path": "norm", "part": "", "kind": "norm", "shape": [48], "tensors": {}}])],
)  # fmt: skip
def test_headers_that_make_no_sense_are_named_errors(good, tmp_path, changes):
    path = tmp_path / "a.safetensors"
    path.write_bytes(with_header(good, **changes))
    before = snapshot(RECEIVER)
    with pytest.raises(vp.VisionPEFTError):
        vp.load(RECEIVER, path)
    assert_same(before, RECEIVER)


def test_foreign_files(tmp_path):
    path = tmp_path / "f.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(AdapterFileError, match="not one that visionpeft wrote"):
        vp.load(RECEIVER, path)
    safetensors.torch.save_file({"w": torch.zeros(2)}, path, {"visionpeft": "{no json"})
    with pytest.raises(AdapterFileError, match="damaged"):
        vp.load(RECEIVER, path)
    for text in ("[]", "3", "null", '"text"'):
        safetensors.torch.save_file({"w": torch.zeros(2)}, path, {"visionpeft": text})
        with pytest.raises(AdapterFileError):
            vp.load(RECEIVER, path)
    with pytest.raises(AdapterFileError, match="missing.safetensors"):
        vp.load(RECEIVER, tmp_path / "missing.safetensors")
    with pytest.raises(AdapterFileError):
        vp.load(RECEIVER, tmp_path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_nothing_is_ever_unpickled(tmp_path, monkeypatch, good):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    for name, write in (("a.pt", torch.save), ("b.safetensors", torch.save)):
        write({"w": Bomb()}, tmp_path / name)
    (tmp_path / "c.safetensors").write_bytes(pickle.dumps(Bomb()))
    for name in ("a.pt", "b.safetensors", "c.safetensors"):
        with pytest.raises(AdapterFileError):
            vp.load(RECEIVER, tmp_path / name)
    assert not (tmp_path / "exploded").exists()
    (tmp_path / "g.safetensors").write_bytes(good)
    for module, name in ((pickle, "loads"), (pickle, "load"), (torch, "load"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("unpickled"))
    vp.load(RECEIVER, tmp_path / "g.safetensors").detach()


# ---- other models ----------------------------------------------------------------------------------------------------

OTHERS = {
    "shallower": (lambda: vit(depth=1), r"blocks\.1\.attn\.qkv:query \[linear 48x48\] is not here"),
    "deeper": (lambda: vit(depth=3), r"sites of .* in the file's model and .* here"),
    "wider": (lambda: vit(embed_dim=96), r"blocks\.0\.attn\.qkv:query is 48x48 in the file and 96x96 here"),
    "other library": (Net, r"a VisionTransformer of timm: blocks\.0.*is not here.*more"),
    "convs": (lambda: timm.create_model("test_resnet"), "is not here"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_wrong_model_is_refused_with_the_first_differing_sites(other, good, tmp_path):
    make, says = OTHERS[other]
    (tmp_path / "a.safetensors").write_bytes(good)
    model = make()
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match=says):
        vp.load(model, tmp_path / "a.safetensors")
    assert_same(before, model)


def test_learnt_tensors_that_are_not_here(tmp_path):
    _, tuner = adapted("bitfit", vit(class_token=True))
    tuner.save(tmp_path / "a.safetensors")
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=3, qkv_bias=False)
    before = snapshot(other)
    with pytest.raises(AdapterFileError, match=r"no blocks\.0\.attn\.qkv\.bias"):
        vp.load(other, tmp_path / "a.safetensors")
    assert_same(before, other)


@pytest.mark.parametrize("method", ["bitfit", "full", "linear"])
def test_learnt_tensors_of_another_width_are_refused_unless_they_are_the_classifier(method, tmp_path):
    _, tuner = adapted(method)
    tuner.save(tmp_path / "a.safetensors")
    other = vit(embed_dim=96)
    before = snapshot(other)
    with pytest.raises(AdapterFileError):
        vp.load(other, tmp_path / "a.safetensors")
    assert_same(before, other)


def test_into_a_model_without_classifier(good, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(good)
    with pytest.raises(AdapterFileError, match="head"):
        vp.load(vit(0), tmp_path / "a.safetensors")


# ---- writing ---------------------------------------------------------------------------------------------------------


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def read_only(*args: object, **kwargs: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("where", ["fsync", "replace", "write", "open"])
@pytest.mark.parametrize("error", [full_disk, read_only])
def test_a_failed_write_leaves_the_old_file_and_no_other(where, error, tmp_path, monkeypatch):
    _, tuner = adapted()
    path = tmp_path / "a.safetensors"
    tuner.save(path, note="old")
    old = path.read_bytes()
    with monkeypatch.context() as patch:
        if where in ("fsync", "replace"):
            patch.setattr(os, where, error)
        else:
            import tempfile

            real = tempfile.NamedTemporaryFile

            def opening(*args, **kwargs):
                if where == "open":
                    error()
                file = real(*args, **kwargs)
                file.write = error
                return file

            patch.setattr(tempfile, "NamedTemporaryFile", opening)
        with pytest.raises(AdapterFileError, match="a.safetensors: cannot write.*the old file is untouched"):
            tuner.save(path, note="new")
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(AdapterFileError) as failed:
            tuner.save(tmp_path / "first.safetensors")
    assert "old file" not in str(failed.value) and os.listdir(tmp_path) == ["a.safetensors"]


def test_an_interrupted_write_leaves_no_temporary_file(tmp_path, monkeypatch):
    _, tuner = adapted()

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tuner.save(tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_and_a_folder_in_the_way_are_named_errors(tmp_path):
    _, tuner = adapted()
    with pytest.raises(AdapterFileError, match="cannot write"):
        tuner.save(tmp_path / "none" / "a.safetensors")
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(AdapterFileError, match="cannot write"):
        tuner.save(tmp_path / "b.safetensors")
    assert os.listdir(tmp_path) == ["b.safetensors"]


def test_the_file_is_readable_as_any_other_new_file(tmp_path):
    _, tuner = adapted()
    tuner.save(tmp_path / "a.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


# ---- state dicts and meta tensors ------------------------------------------------------------------------------------


def test_load_state_dict_is_all_or_nothing():
    _, tuner = adapted()
    state = {k: v.clone() for k, v in tuner.state_dict().items()}
    first = next(iter(state))
    for wrong, says in (
        ({k: v for k, v in state.items() if k != first}, "1 missing"),
        ({**state, "more": torch.zeros(1)}, "1 unknown: .*more"),
        ({**{k: v + 1 for k, v in state.items()}, first: torch.zeros(1)}, "1 of another shape"),
    ):
        with pytest.raises(vp.VisionPEFTError, match=says):
            tuner.load_state_dict(wrong)
        assert all(torch.equal(v, state[k]) for k, v in tuner.state_dict().items())
    tuner.load_state_dict({k: v + 1 for k, v in state.items()})
    assert all(torch.equal(v, state[k] + 1) for k, v in tuner.state_dict().items())


def test_counts_on_meta_tensors_are_free():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=100)
    before = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    for method, count in (
        (vp.LoRA(rank=8), 12 * 2 * 8 * 1536),
        (vp.LoRA(rank=8, targets="linear"), 12 * 8 * (768 + 2304 + 1536 + 2 * 3840)),
        ("bitfit", sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias")) - 100),
        ("full", sum(p.numel() for p in model.parameters())),
        (vp.AdaptFormer(hidden=64), 12 * (2 * 64 * 768 + 64 + 768)),
    ):
        tuner = vp.attach(model, method, train="head")
        assert tuner.num_parameters == count, method
        assert all(p.is_meta for p in tuner.parameters())
        tuner.detach()
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == before


def test_meta_adapters_cannot_be_saved_silently(tmp_path):
    with torch.device("meta"):
        model = vit()
    tuner = vp.attach(model, "lora", train="head")
    with pytest.raises(vp.VisionPEFTError):
        tuner.save(tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []
