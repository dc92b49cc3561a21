"""The model that tells parts apart: its head by formulas in float64, official names and counts, methods upon it."""

from __future__ import annotations

import pytest
import tiny_points
import torch
import torch.nn.functional as F

import visionpeft as vp
from visionpeft.errors import VisionPEFTError
from visionpeft.models import point_checkpoints, point_mae, point_ops
from visionpeft.models.point_ops import PointError
from visionpeft.models.point_parts import create

TINY = tiny_points.TINY | {"depth": 3}
FIELDS = {"pointgst": {"rank": 3, "local": 4}, "idpt": {"neighbours": 3}, "dapt": {"hidden": 4},
          "ppt": {"tokens": 5, "hidden": 4}, "point_peft": {"neighbours": 3, "tokens": 2, "hidden": 4},
          "lora": {"rank": 2}, "ssf": {}, "bitfit": {}, "ln_tuning": {}, "adaptformer": {"hidden": 4},
          "houlsby": {"hidden": 4}, "pfeiffer": {"hidden": 4}, "vpt": {"tokens": 2}, "linear": {}, "full": {}}


def tiny(dtype=torch.float64, categories: int = 3):
    torch.manual_seed(0)
    return tiny_points.disturb(create("point_mae", parts=5, categories=categories, **TINY)).to(dtype)


def points(dtype=torch.float64) -> torch.Tensor:
    kinds = torch.tensor([2, 0, 1], dtype=dtype)[:, None, None].expand(3, 40, 1)
    return torch.cat([tiny_points.points(dtype=dtype), kinds], -1)


def batchnorm(s, name, x):
    x = (x - s[f"{name}.running_mean"]) / (s[f"{name}.running_var"] + 1e-5).sqrt()
    return x * s[f"{name}.weight"] + s[f"{name}.bias"]


def conv(s, name, x):
    return x @ s[f"{name}.weight"][..., 0].T + s[f"{name}.bias"]


def test_the_head_by_its_formulas():
    model = tiny().eval()
    assert model.levels == (0, 1, 2)
    s, x = model.state_dict(), points()
    around, centres = point_ops.group(x[..., :3], 8, 4)
    tokens, levels = model.encoder(around), []
    for block in model.blocks.blocks:
        tokens = block(tokens + model.pos_embed(centres))
        levels.append(F.layer_norm(tokens, (12,), s["norm.weight"], s["norm.bias"]))
    f = torch.cat(levels, -1)
    for b, kind in enumerate((2, 0, 1)):
        label = F.leaky_relu(batchnorm(s, "label_conv.1", s["label_conv.0.weight"][:, kind, 0]), 0.2)
        whole = torch.cat([f[b].max(0).values, f[b].mean(0), label])
        for n in (0, 17, 39):
            far = (centres[b] - x[b, n, :3]).square().sum(-1)
            near = far.argsort()[:3]
            w = 1 / (far[near] + 1e-8)
            own = torch.cat([x[b, n, :3], (w / w.sum()) @ f[b][near]])
            for i in range(2):
                own = batchnorm(s, f"propagation_0.mlp_bns.{i}", conv(s, f"propagation_0.mlp_convs.{i}", own)).relu()
            y = torch.cat([own, whole])
            for i in (1, 2):
                y = batchnorm(s, f"bns{i}", conv(s, f"convs{i}", y)).relu()
            torch.testing.assert_close(model(x)[b, :, n], conv(s, "convs3", y), rtol=1e-9, atol=1e-9)


def test_counts_names_and_levels_of_the_official_code():
    with torch.device("meta"):
        model = create("point_mae")
    assert sum(p.numel() for p in model.parameters()) == 27_063_730
    assert model.levels == (3, 7, 11)
    names = {name.split(".")[0] for name, _ in model.named_children()}
    assert names == {"group_divider", "encoder", "pos_embed", "blocks", "norm", "label_conv", "propagation_0", "convs1",
                     "bns1", "dp1", "convs2", "bns2", "convs3"}  # fmt: skip
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert shapes["propagation_0.mlp_convs.0.weight"] == (1536, 1155, 1)
    assert shapes["convs1.weight"] == (512, 3392, 1) and shapes["convs3.weight"] == (50, 256, 1)


def test_pretrained_weights_fill_all_but_the_head(tmp_path):
    torch.manual_seed(3)
    source = point_mae.create("point_mae", **TINY)
    torch.save({"base_model": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "p.pth")
    model = tiny(torch.float32)
    missing, _ = point_checkpoints.load(model, tmp_path / "p.pth")
    head = {"label_conv", "propagation_0", "convs1", "bns1", "convs2", "bns2", "convs3"}
    assert {key.split(".")[0] for key in missing} == head
    theirs, own = source.MAE_encoder.state_dict(), model.state_dict()
    assert set(own) - set(theirs) == set(missing) and all(torch.equal(own[k], v) for k, v in theirs.items())


@pytest.mark.parametrize("key", FIELDS)
def test_methods_act_learn_and_leave_no_trace(key, tmp_path):
    model = tiny(torch.float32).eval()
    x, before = points(torch.float32), {k: v.clone() for k, v in model.state_dict().items()}
    plain = model(x)
    torch.manual_seed(1)
    tuner = vp.attach(model, vp.METHODS[key](**FIELDS[key]), train="head")
    assert model(x).shape == (3, 5, 40)
    if key in ("pointgst", "lora", "adaptformer", "bitfit", "ln_tuning", "linear", "full"):
        assert torch.equal(model.eval()(x), plain)
    with torch.no_grad():
        for p in tuner.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    model.train()
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in tuner.parameters())
    learnt = {id(p) for p in tuner.parameters()}
    assert all(id(p) in learnt for name, p in model.named_parameters() if name.startswith(("convs", "label", "prop")))
    y = model.eval()(x)
    tuner.save(tmp_path / "a.safetensors")
    other = tiny(torch.float32).eval()
    vp.load(other, tmp_path / "a.safetensors")
    assert torch.equal(other.eval()(x), y) and not torch.equal(y, plain)
    tuner.detach()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and torch.equal(model.eval()(x), plain)


@pytest.mark.parametrize("key", ["vpt", "point_peft", "dapt", "idpt"])
def test_prompts_have_no_position_and_patches_keep_theirs(key):
    """Patches permuted with positions and centres come out permuted."""
    model = tiny().eval()
    vp.attach(model, vp.METHODS[key](**FIELDS[key]), train="head", probe=False)
    model.eval()
    centres = model.group_divider(points()[..., :3])[1]
    x = torch.randn(3, 8, 12, dtype=torch.float64)
    order = torch.tensor([3, 0, 7, 6, 1, 5, 2, 4])
    if key == "point_peft":  # samples from the first
        order = torch.tensor([0, 3, 7, 6, 1, 5, 2, 4])

    def run(x, centres):
        y, positions = x, model.pos_embed(centres)
        for block in model.blocks.blocks:
            y = block(y, positions, centres)
        return y[:, -8:]

    torch.testing.assert_close(run(x[:, order], centres[:, order]), run(x, centres)[:, order], rtol=1e-9, atol=1e-9)


def test_categories_are_asked_for_and_checked():
    model = tiny()
    with pytest.raises(PointError, match="number of its category, 0 to 2"):
        model(points()[..., :3])
    bad = points()
    bad[1, :, 3] = 7
    with pytest.raises(PointError, match="cloud 1 has category 7"):
        model(bad)
    single = tiny(categories=1).eval()
    same = torch.cat([points()[..., :3], torch.zeros(3, 40, 1, dtype=torch.float64)], -1)
    assert torch.equal(single(same[..., :3]), single(same))
    with pytest.raises(VisionPEFTError, match="Point-MAE's kind"):
        create("pointgpt_s")
