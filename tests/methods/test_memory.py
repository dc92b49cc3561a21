"""Inputs made again equal inputs kept, checkpointing gives the same gradients, and neither costs memory."""

from __future__ import annotations

import warnings

import pytest
import torch
import zoo
from torch import nn

import visionpeft as vp
from visionpeft import lowrank
from visionpeft.memory import live_bytes

every = pytest.mark.parametrize("case", zoo.CASES, ids=str)


def assert_close(found: dict, expected: dict, tolerance: float = 1e-4) -> None:
    assert set(found) == set(expected)
    scale = max((float(g.abs().max()) for g in expected.values()), default=0.0)
    for name, grad in found.items():
        far = float((grad - expected[name]).abs().max())
        assert far <= tolerance * max(float(expected[name].abs().max()), 0.01 * scale), f"{name}: {far}"


@every
def test_rebuilt_inputs_are_the_kept_ones_to_the_bit(case, monkeypatch):
    x = tuple(t.requires_grad_(t.is_floating_point()) for t in zoo.inputs(case.backbone))
    model, tuner = zoo.tune(case, **({"targets": "linear"} if case.method == "lora" and "linear" in
                                     zoo.OFFERS[case.backbone] else {}))  # fmt: skip
    model.train()
    rebuilt = zoo.gradients(model, tuner, x)
    monkeypatch.setattr(lowrank, "recipe", lambda x: None)
    kept = zoo.gradients(model, tuner, x)
    # (y - beta) / gamma is not z to the bit; DAPT scales and shifts by the same adapters
    inverted = {n for n in kept if case.method in ("ssf", "dapt") and n.endswith("gamma")}
    assert [n for n in kept if n not in inverted and not torch.equal(kept[n], rebuilt[n])] == []
    assert_close({n: rebuilt[n] for n in inverted}, {n: kept[n] for n in inverted}, 1e-5)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=["bf16"])
def test_rebuilt_under_autocast(case, dtype, monkeypatch):
    if case.method != "lora" or "linear" not in zoo.OFFERS[case.backbone]:
        pytest.skip("nothing is rebuilt")
    x = zoo.inputs(case.backbone)
    model, tuner = zoo.tune(case, targets="linear")
    with torch.autocast("cpu", dtype):
        rebuilt = zoo.gradients(model, tuner, x)
        monkeypatch.setattr(lowrank, "recipe", lambda x: None)
        kept = zoo.gradients(model, tuner, x)
    assert [n for n in kept if not torch.equal(kept[n], rebuilt[n])] == []


@every
def test_fused_equals_plain_torch(case):
    x = zoo.inputs(case.backbone)
    model, tuner = zoo.tune(case, **({"targets": "linear"} if case.method == "lora" and "linear" in
                                     zoo.OFFERS[case.backbone] else {}))  # fmt: skip
    model.train()
    fused, y = zoo.gradients(model, tuner, x), zoo.see(model, x)
    tuner.fused = False
    assert not tuner.fused
    assert zoo.distance(zoo.see(model, x), y) < 1e-5
    assert_close(fused, zoo.gradients(model, tuner, x))


@every
def test_gradients_against_double_precision(case):
    """The gradients of every tensor, also of the input, against plain torch in float64."""
    x = tuple(t.clone().requires_grad_(t.is_floating_point()) for t in zoo.inputs(case.backbone))
    model, tuner = zoo.tune(case)
    found = zoo.gradients(model, tuner, x)
    wide, wide_tuner = zoo.tune(case)
    wide.double()
    wide_tuner.fused = False
    wide_x = tuple(t.clone().requires_grad_(t.is_floating_point()) for t in zoo.inputs(case.backbone, torch.float64))
    expected = {n: g.float() for n, g in zoo.gradients(wide, wide_tuner, wide_x).items()}
    assert_close(found, expected, 2e-3)
    assert_close({"x": x[0].grad}, {"x": wide_x[0].grad.float()}, 2e-3)


@every
def test_an_in_place_operation_after_the_site(case):
    """A caller may write to what a site returns; gradients stay right."""

    def gradients(dtype: torch.dtype, fused: bool) -> dict:
        model, tuner = zoo.tune(case)
        model.to(dtype)
        tuner.fused = fused
        for site in tuner.sites:
            if site.kind in ("linear", "conv") and not site.host:
                module = model.get_submodule(site.path)
                if not module._forward_hooks:
                    module.register_forward_hook(lambda m, i, y: y.add_(1))
        return {n: g.float() for n, g in zoo.gradients(model, tuner, zoo.inputs(case.backbone, dtype)).items()}

    assert_close(gradients(torch.float32, True), gradients(torch.float64, False), 2e-3)


@pytest.mark.parametrize("before", ["norm", "gelu", "silu", "product", "relu", "none"])
@pytest.mark.parametrize("layout", ["plain", "permuted", "sliced", "transposed"])
@pytest.mark.parametrize("write", ["nothing", "input before", "input", "view of input", "source"])
def test_whatever_stands_before_the_site(before, layout, write):
    """Layouts and writes that could make a rebuilt input differ from the one that was used."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.lin, self.gate = nn.LayerNorm(6), nn.Linear(6, 5), nn.Parameter(torch.randn(6))

        def forward(self, x):
            u = x * 1.5
            if layout == "permuted":
                u = u.permute(2, 0, 1).contiguous().permute(1, 2, 0)
            elif layout == "sliced":
                u = torch.cat([u, u], -1)[..., :6]
            acts = {"norm": self.norm, "gelu": nn.functional.gelu, "silu": nn.functional.silu,
                    "product": lambda t: t * t.sigmoid(), "relu": torch.relu, "none": lambda t: t + 0}  # fmt: skip
            h = acts[before](u)
            if layout == "transposed":
                h = h.transpose(0, 1)
            with torch.no_grad():
                if write == "input before":
                    h[1:].mul_(2)
            y = self.lin(h)
            with torch.no_grad():
                if write == "input":
                    h.add_(3)
                elif write == "view of input":
                    h[..., :2].mul_(2)
                elif write == "source":
                    u.mul_(-1)
            return y

    def gradients(rebuild: bool) -> dict | str:
        torch.manual_seed(0)
        model = Chain()
        tuner = vp.attach(model, vp.LoRA(rank=2, targets="lin"), probe=False)
        zoo.disturb(tuner)
        tuner.fused = rebuild
        x = torch.randn(3, 4, 6, requires_grad=True)
        try:
            return {**zoo.gradients(model, tuner, (x,)), "x": x.grad}
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            return "refused"

    found, expected = gradients(True), gradients(False)
    if expected != "refused" and found != "refused":
        assert_close(found, expected, 1e-5)
    if write == "nothing":
        assert "refused" not in (found, expected)


CHECKPOINTED = ("vit", "dinov2", "eva02", "beit", "swinv2", "convnext", "resnet", "bit", "efficientnet", "clip")


@pytest.mark.parametrize("case", zoo.on(*CHECKPOINTED), ids=str)
def test_checkpointing_gives_the_same_gradients(case):
    x = zoo.inputs(case.backbone)
    model, tuner = zoo.tune(case)
    model.train(zoo.METHODS[case.method].freezes_statistics)
    expected = zoo.gradients(model, tuner, x)
    model.set_grad_checkpointing(True)
    found = zoo.gradients(model, tuner, x)
    assert set(found) == set(expected)
    assert_close(found, expected, 1e-5)


def wide_vit(depth: int = 4) -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=96, depth=depth, num_heads=4,
                             num_classes=5)  # fmt: skip


def alive(model: nn.Module) -> int:
    x = torch.randn(8, 3, 64, 64, requires_grad=True)
    model(x)  # what is made once is not counted
    return live_bytes(lambda: model(x))


@pytest.mark.parametrize("key", [key for key in zoo.METHODS if key not in zoo.POINTS])
@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "plain"])
def test_bytes_alive_after_forward(key, checkpointed):
    """Checkpointed, only the blocks' inputs are alive, adapted or not. Without, low-rank adapters keep 5 % more."""
    if not checkpointed and key != "lora":
        pytest.skip("promised of low-rank adapters")
    if zoo.home(key).backbone == "clip":
        pytest.skip("acts on text")
    model = wide_vit().train().requires_grad_(False)
    model.set_grad_checkpointing(checkpointed)
    frozen = alive(model)
    fields = {"targets": "linear"} if key == "lora" else {}
    tuner = vp.attach(model, zoo.method(key, **fields), train="head")
    longer = (65 + 3) / 65 if key == "vpt" else 1.0
    own = 4 * sum(p.numel() for p in tuner.parameters())
    stream = 8 * 65 * 96 * 4  # kept outside the blocks: by the head, and by an adapter of the patch embedding
    outside = stream * (1 + any(s.role == "patch_embed" for s in tuner.sites)) if checkpointed else 0
    assert alive(model) <= frozen * longer * 1.05 + own + outside


_ENTRIES = {f"blocks.{i}.{m}": [0, 7, 900] for i in (0, 1) for m in ("attn.qkv:key", "attn.proj", "mlp.fc1", "mlp.fc2")}
LEAN = {  # what runs beside a Linear -> whether it keeps anything
    "shira": (vp.methods.SHiRA(targets="linear"), False),
    "spt": (vp.methods.SPT(sparse=_ENTRIES), False),
    "fact_tt": (vp.methods.FacTTT(rank=4), True),  # with dropout, which is the default: no low-rank part
    "fact_tk": (vp.methods.FacTTK(rank=4), True),
    "binary_lora": (vp.methods.BinaryLoRA(rank=8), True),
    "parallel": (vp.methods.ParallelAdapter(hidden=16), True),
}


@pytest.mark.parametrize("key", LEAN)
def test_adapters_keep_what_is_of_their_own_width_alone(key):
    """None keeps its input, which several might share, nor SHiRA and SPT the matrix that they multiply with."""
    (method, keeps), model = LEAN[key], wide_vit(depth=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = vp.attach(model, method).memory_report(torch.randn(8, 3, 64, 64))
    kept = [entry.kept for entry in report if entry.site.kind != "tensor"]
    assert report.adapted - report.frozen == sum(kept) and max(kept) < 8 * 65 * 96 * 4
    assert keeps == (report.adapted > report.frozen)
