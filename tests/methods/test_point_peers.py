"""IDPT, DAPT and PPT: the adapted classifier in float64 against its description, written out from the state dict."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tiny_points import TINY, disturb, points
from torch.utils.checkpoint import checkpoint

import visionpeft as vp
from visionpeft.errors import MethodError, SiteError
from visionpeft.methods.point_memory import remember
from visionpeft.models import point_ops
from visionpeft.models.point_transformer import create

FIELDS = {"point_peft": {"neighbours": 3, "tokens": 2, "hidden": 4},
          "idpt": {"neighbours": 3}, "dapt": {"hidden": 4}, "ppt": {"tokens": 5, "hidden": 4}}


def adapted(key: str, dtype=torch.float64, **given):
    torch.manual_seed(0)
    model = disturb(create("point_mae", num_classes=5, **TINY)).to(dtype)
    tuner = vp.attach(model, vp.METHODS[key](**(FIELDS[key] | given)), train="head")
    with torch.no_grad():
        for p in tuner.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        for a in tuner.adapters.values():
            if hasattr(a, "mean"):
                a.mean.normal_()
                a.var.uniform_(0.5, 2)
    return model.eval(), tuner


class Hand:
    """The pieces of Point-MAE from tensors, with a hook `touch(name, value)` behind every operation."""

    def __init__(self, model, touch=lambda name, value: value) -> None:
        self.s, self.touch = model.state_dict(), touch

    def lin(self, name, x):
        return self.touch(name, F.linear(x, self.s[f"{name}.weight"], self.s.get(f"{name}.bias")))

    def norm(self, name, x):
        weight = self.s[f"{name}.weight"]
        return self.touch(name, F.layer_norm(x, weight.shape, weight, self.s[f"{name}.bias"]))

    def batchnorm(self, name, x, eps=1e-5):
        x = (x - self.s[f"{name}.running_mean"]) / (self.s[f"{name}.running_var"] + eps).sqrt()
        return x * self.s[f"{name}.weight"] + self.s[f"{name}.bias"]

    def conv(self, name, x):
        return x @ self.s[f"{name}.weight"][..., 0].T + self.s[f"{name}.bias"]

    def encode(self, around):
        f = self.batchnorm("encoder.first_conv.1", self.conv("encoder.first_conv.0", around)).relu()
        f = self.conv("encoder.first_conv.3", f)
        f = torch.cat([f.max(2, keepdim=True).values.expand_as(f), f], -1)
        f = self.batchnorm("encoder.second_conv.1", self.conv("encoder.second_conv.0", f)).relu()
        return self.touch("encoder", self.conv("encoder.second_conv.3", f).max(2).values)

    def position(self, centres):
        return self.lin("pos_embed.2", F.gelu(self.lin("pos_embed.0", centres)))

    def attention(self, b, x):
        q, k, v = self.lin(f"{b}.attn.qkv", self.norm(f"{b}.norm1", x)).chunk(3, -1)
        q, k, v = (z.unflatten(-1, (2, -1)).transpose(1, 2) for z in (q, k, v))
        a = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        return x + self.lin(f"{b}.attn.proj", a.transpose(1, 2).flatten(2))

    def mlp(self, b, n):
        return self.lin(f"{b}.mlp.fc2", F.gelu(self.lin(f"{b}.mlp.fc1", n)))

    def head(self, tuner, cls, more, pooled):
        (columns,) = [a.columns for a in tuner.adapters.values() if hasattr(a, "columns")]
        left, right = self.s["cls_head_finetune.0.weight"].chunk(2, 1)  # one weight of a classifier of three features
        y = torch.cat([cls, more, pooled], -1) @ torch.cat([left, columns, right], 1).T
        y = self.batchnorm("cls_head_finetune.1", y + self.s["cls_head_finetune.0.bias"]).relu()
        y = self.batchnorm("cls_head_finetune.5", self.lin("cls_head_finetune.4", y)).relu()
        return self.lin("cls_head_finetune.8", y)

    def start(self, centres, tokens):
        front, place = (self.s[name].expand(len(tokens), -1, -1) for name in ("cls_token", "cls_pos"))
        return torch.cat([front, tokens], 1), torch.cat([place, self.position(centres)], 1)


def places(tuner, role: str):
    return [a for site, a in tuner.adapters.items() if site.role == role]


def close(model, expected):
    torch.testing.assert_close(model(points()), expected, rtol=1e-10, atol=1e-10)


def test_idpt_by_its_description():
    model, tuner = adapted("idpt")
    hand, (a,) = Hand(model), places(tuner, "block")
    around, centres = point_ops.group(points(), 8, 4)
    x, pos = hand.start(centres, hand.encode(around))
    for i in range(2):
        b = f"blocks.blocks.{i}"
        if i == 1:
            f, maps = x[:, 1:], []
            for n, weight in enumerate(a.edges):
                near = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist").topk(3, largest=False).indices
                pairs = torch.stack([f[c][near[c]] for c in range(3)])
                own = f.unsqueeze(2).expand_as(pairs)
                e = torch.cat([pairs - own, own], -1) @ weight.T
                e = (e - a.mean[n]) / (a.var[n] + 1e-5).sqrt() * a.norm_weight[n] + a.norm_bias[n]
                f = F.leaky_relu(e, 0.2).max(2).values
                maps.append(f)
            e = torch.cat(maps, -1) @ a.join.T
            e = (e - a.mean[3]) / (a.var[3] + 1e-5).sqrt() * a.norm_weight[3] + a.norm_bias[3]
            prompt = F.leaky_relu(e, 0.2).max(1, keepdim=True).values
            x = torch.cat([x[:, :1], prompt, x[:, 1:]], 1)
            pos = torch.cat([pos[:, :1], a.position.expand(3, -1, -1), pos[:, 1:]], 1)
        x = hand.attention(b, x + pos)
        x = x + hand.mlp(b, hand.norm(f"{b}.norm2", x))
    x = hand.norm("norm", x)
    close(model, hand.head(tuner, x[:, 0], x[:, 1], x[:, 2:].max(1).values))


def test_dapt_by_its_description():
    model, tuner = adapted("dapt")
    scale = {site.path: a for site, a in tuner.adapters.items() if hasattr(a, "gamma") and site.role != "block"}
    assert len(scale) == 2 + 6 * 2
    hand = Hand(model, lambda n, v: v * scale[n].gamma + scale[n].beta if n in scale else v)
    around, centres = point_ops.group(points(), 8, 4)
    x, pos = hand.start(centres, hand.encode(around))
    x = x + pos
    for i, (a, p) in enumerate(zip(places(tuner, "mlp"), places(tuner, "block"), strict=True)):
        b = f"blocks.blocks.{i}"
        x = hand.attention(b, x)
        n = hand.norm(f"{b}.norm2", x)
        m = F.layer_norm(n, (12,), a.norm_weight, a.norm_bias)
        branch = (F.gelu(m @ a.down_weight.T + a.down_bias) @ a.up_weight.T + a.up_bias)
        branch = branch * (m @ a.scale_weight.T + a.scale_bias).relu()
        x = x + hand.mlp(b, n) + branch
        prompt = F.gelu(branch).mean(1, keepdim=True) * p.gamma + p.beta
        x = torch.cat([x[:, :1], prompt, x[:, 1:]], 1)
    x = hand.norm("norm", x)
    assert x.shape[1] == 1 + 2 + 8
    close(model, hand.head(tuner, x[:, 0], x[:, 1:3].mean(1), x[:, 3:].max(1).values))


def test_ppt_by_its_description():
    model, tuner = adapted("ppt")
    hand, (mlps,) = Hand(model), [a for site, a in tuner.adapters.items() if site.kind == "shared"]

    def run(i, x):
        h = F.gelu(x @ mlps.weight_in[i].T + mlps.bias_in[i])
        return h @ mlps.weight_out[i].T + mlps.bias_out[i]

    groups = [point_ops.group(points(), count, 4) for count in (8, 5)]
    centres = torch.cat([c for _, c in groups], 1)
    x, pos = hand.start(centres, torch.cat([hand.encode(around) for around, _ in groups], 1))
    for i in range(2):
        b = f"blocks.blocks.{i}"
        x = x + pos
        x = torch.cat([x[:, :1], x[:, 1:9] + run(0, x[:, 1:9]), x[:, 9:] + run(1, x[:, 9:])], 1)
        x = hand.attention(b, x)
        x = x + hand.mlp(b, hand.norm(f"{b}.norm2", x)) + run(2, x)
    x = hand.norm("norm", x)
    close(model, hand.head(tuner, x[:, 0], x[:, 9:].mean(1), x[:, 1:9].mean(1)))


def clouds(count: int = 7, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(count, 40, 3, generator=torch.Generator().manual_seed(8)).to(dtype)


def frozen_features(hand, x):
    """The maximum over the tokens of the model without class token and adapters."""
    around, centres = point_ops.group(x, 8, 4)
    t, pos = hand.encode(around), hand.position(centres)
    for i in range(2):
        t = hand.attention(f"blocks.blocks.{i}", t + pos)
        t = t + hand.mlp(f"blocks.blocks.{i}", hand.norm(f"blocks.blocks.{i}.norm2", t))
    return hand.norm("norm", t).max(1).values


@pytest.mark.parametrize("memory", [0, 5])
def test_point_peft_by_its_description(memory):
    model, tuner = adapted("point_peft", memory=memory, **({"tokens": 4} if memory else {}))
    hand, (shared,) = Hand(model), [a for site, a in tuner.adapters.items() if site.kind == "shared"]
    count = 4 if memory else 2
    if memory:
        model.train()
        remember(tuner, clouds())
        assert model.blocks.blocks[0].norm1.training
        model.eval()
        rows = torch.stack([frozen_features(hand, c[None])[0] for c in clouds()[[0, 2, 3, 4, 6]]])  # 5 of 7, evenly
        rows = rows / rows.norm(dim=1, keepdim=True)
        priors = []
        for f in frozen_features(hand, points()):
            s = rows @ f / f.norm()
            first, second = s.argsort(descending=True)[:2]
            w = torch.stack([s[first], s[second]]).softmax(0)
            mean = w[0] * rows[first] + w[1] * rows[second]
            priors.append(torch.stack([f, mean, rows[first], rows[second]]))
        prior = torch.stack(priors)

    def bottleneck(a, u):
        h = u @ a.down_weight.T + a.down_bias
        return h * torch.sigmoid(1.702 * h) @ a.up_weight.T + a.up_bias

    def attend(n):
        q, k, v = (F.layer_norm(n, (12,), shared.norm_weight, shared.norm_bias) @ shared.qkv.T).chunk(3, -1)
        heads = [(q[..., s] @ k[..., s].T / 18**0.5).softmax(-1) @ v[..., s] for s in torch.arange(18).view(6, 3)]
        return torch.cat(heads, -1) @ shared.proj_weight.T + shared.proj_bias

    around, centres = point_ops.group(points(), 8, 4)
    x, pos = hand.start(centres, hand.encode(around))
    for i, (a, p) in enumerate(zip(places(tuner, "mlp"), places(tuner, "block"), strict=True)):
        b = f"blocks.blocks.{i}"
        x = x + pos
        if i == 0:  # the first half of the blocks
            prompts = p.prompts.expand(3, -1, -1)
            if memory:
                h = prior @ p.prior_down_weight.T + p.prior_down_bias
                prompts = prompts + prior + h * torch.sigmoid(1.702 * h) @ p.prior_up_weight.T + p.prior_up_bias
            x = torch.cat([x[:, :1], prompts, x[:, 1:]], 1)
        assert x.shape[1] == 9 + (count if i == 0 else 0)
        x = hand.attention(b, x)
        z = hand.mlp(b, hand.norm(f"{b}.norm2", x))
        x = x + z + 0.7 * bottleneck(a, z)
        front, patches = x[:, :-8], []
        for f, c in zip(x[:, -8:], centres, strict=True):
            few = point_ops.farthest_points(c[None], 4)[0]
            v = []
            for j in few:
                n = f[(c - c[j]).square().sum(-1).argsort()[:3]]
                top = (n + attend(n)).max(0).values
                normed = (top - p.mean) / (p.var + 1e-5).sqrt() * p.norm_weight + p.norm_bias
                v.append(F.gelu(normed) + 0.3 * f[j])
            w = 1 / ((c[:, None] - c[few]).square().sum(-1) + 1e-8)
            patches.append(f + 0.3 * (w / w.sum(1, keepdim=True)) @ torch.stack(v))
        x = torch.cat([front, torch.stack(patches)], 1)
        x = x + bottleneck(p, x)
        x = torch.cat([x[:, :1], x[:, -8:]], 1)
    x = hand.norm("norm", x)
    y = torch.cat([x[:, 0], x[:, 1:].max(1).values], -1)
    for i in (0, 4):
        y = hand.batchnorm(f"cls_head_finetune.{i + 1}", hand.lin(f"cls_head_finetune.{i}", y)).relu()
    close(model, hand.lin("cls_head_finetune.8", y))


def test_adapters_of_dapt_stand_before_drop_path():
    model, tuner = adapted("dapt")
    block = model.blocks.blocks[1].train()
    block.drop_path2.rate = 1 - 1e-9  # drops every sample
    x, centres = torch.randn(3, 9, 12, dtype=torch.float64), points()[:, :8]
    with torch.no_grad():
        out = block(x, None, centres)
    hand = Hand(model, lambda n, v: v)
    scale = {site.path: a for site, a in tuner.adapters.items() if hasattr(a, "gamma") and site.role != "block"}
    hand.touch = lambda n, v: v * scale[n].gamma + scale[n].beta if n in scale else v
    expected = hand.attention("blocks.blocks.1", x)
    torch.testing.assert_close(torch.cat([out[:, :1], out[:, 2:]], 1), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("key", FIELDS)
def test_saved_loaded_and_taken_off(key, tmp_path):
    model, tuner = adapted(key, torch.float32)
    x = points(dtype=torch.float32)
    y = model(x)
    tuner.save(tmp_path / "a.safetensors")
    torch.manual_seed(0)
    other = create("point_mae", num_classes=7, **TINY).eval()  # another classifier: the adapter brings its own
    before = {k: v.clone() for k, v in other.state_dict().items()}
    loaded = vp.load(other, tmp_path / "a.safetensors")
    assert other.eval()(x).shape == (3, 5)
    loaded.detach()
    assert other(x).shape == (3, 7) and all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    copied = tuner.state_dict()
    again, second = adapted(key, torch.float32)
    second.load_state_dict(copied)
    assert torch.equal(again(x), y)


@pytest.mark.parametrize("key", FIELDS)
def test_every_tensor_learns(key):
    model, tuner = adapted(key, torch.float32)
    model.train()
    model(points(dtype=torch.float32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuner.parameters())


@pytest.mark.parametrize("key", FIELDS)
def test_other_models_are_refused(key):
    with pytest.raises(SiteError, match="point transformer"):
        vp.attach(torch.nn.Linear(2, 2), key)
    if key == "point_peft":
        return
    with pytest.raises(SiteError, match="one class token"):
        vp.attach(create("pointgpt_s", 5, **TINY), key)


BANK = {"memory": 5, "tokens": 4}


def test_a_memory_bank_is_filled_first_and_travels_with_the_adapter(tmp_path):
    model, tuner = adapted("point_peft", torch.float32, **BANK)
    x = points(dtype=torch.float32)
    with pytest.raises(SiteError, match=r"remember\(tuner, clouds\) with 5"):
        model(x)
    with pytest.raises(SiteError, match="4 clouds do not fill a memory bank of 5"):
        remember(tuner, clouds(4, torch.float32))
    remember(tuner, clouds(dtype=torch.float32))
    y = model(x)
    for a in tuner.adapters.values():
        if hasattr(a, "bank"):
            assert torch.allclose(a.bank.norm(dim=1), torch.ones(5))
            a.bank.neg_()
            assert not torch.allclose(model(x), y)
            a.bank.neg_()
    tuner.save(tmp_path / "a.safetensors")
    torch.manual_seed(0)
    other = adapted("point_peft", torch.float32)[0]
    vp.tuners(other)["default"].detach()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if ".peft." not in k and "peft." not in k})
    vp.load(other, tmp_path / "a.safetensors")
    assert torch.equal(other.eval()(x), y)
    assert torch.equal(copy.deepcopy(model)(x), y) and torch.equal(pickle.loads(pickle.dumps(model))(x), y)


def test_two_forwards_keep_their_priors_apart():
    model, tuner = adapted("point_peft", torch.float32, dropout=0.0, **BANK)
    remember(tuner, clouds(dtype=torch.float32))
    x = points(dtype=torch.float32)

    def gradients():
        model.zero_grad(set_to_none=True)
        first, second = (model(part).square().sum() for part in (x[:1], x[1:2]))
        first.backward()
        second.backward()
        return [p.grad.clone() for a in tuner.adapters.values() for p in a.parameters()]

    expected = gradients()
    for block in model.blocks.blocks:
        real = block.forward
        block.__dict__["forward"] = lambda *a, real=real: checkpoint(real, *a, use_reentrant=False)
    assert all(map(torch.equal, gradients(), expected))
    priors = next(a.priors for a in tuner.adapters.values() if hasattr(a, "bank"))
    assert not priors._held


def test_memory_banks_that_make_no_sense_are_named():
    for fields, words in (({"memory": 1}, "memory at least"), ({"memory": 5, "tokens": 2}, "tokens is 3 or more"),
                          ({"memory": 9, "legacy": True}, "legacy")):  # fmt: skip
        with pytest.raises(MethodError, match=words):
            vp.methods.PointPEFT(**fields)
    with pytest.raises(SiteError, match="Point-MAE's kind"):
        vp.attach(create("pointgpt_s", 5, **TINY), vp.methods.PointPEFT(memory=9), train="head")
    _, tuner = adapted("point_peft")
    with pytest.raises(SiteError, match="no memory bank"):
        remember(tuner, clouds())


def test_numbers_of_point_peft_with_a_memory_bank():
    with torch.device("meta"):
        model = create("point_mae", 15)
        tuner = vp.attach(model, vp.methods.PointPEFT(memory=100), train="head")
    assert sum(p.numel() for p in tuner.parameters()) == 633_871 + 6 * (2 * 384 * 8 + 8 + 384) == 673_087


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", FIELDS)
def test_statistics_of_the_frozen_encoder_drift_only_if_legacy(key, legacy):
    model = adapted(key, torch.float32, legacy=legacy)[0].train()
    norm = model.encoder.first_conv[1]
    before = norm.running_mean.clone()
    model(points(dtype=torch.float32)).sum().backward()
    assert norm.training is legacy and torch.equal(norm.running_mean, before) is not legacy
