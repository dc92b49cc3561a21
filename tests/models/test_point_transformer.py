"""The point transformers: official names and counts, the forward by its formulas, weights in, bad weights refused."""

from __future__ import annotations

import pickle

import pytest
import tiny_points
import torch
import torch.nn.functional as F

from visionpeft.errors import VisionPEFTError
from visionpeft.models import point_checkpoints, point_gpt, point_mae, point_ops, point_transformer
from visionpeft.models.point_checkpoints import CheckpointError
from visionpeft.models.point_transformer import create

TINY = tiny_points.TINY | {"groups": 6, "drop_path": 0.1}
HEAD = {"cls_token", "cls_pos"} | {
    f"cls_head_finetune.{i}.{n}" for i in (0, 1, 4, 5, 8) for n in ("weight", "bias")
} | {f"cls_head_finetune.{i}.{n}" for i in (1, 5) for n in ("running_mean", "running_var", "num_batches_tracked")}


def tiny(name: str = "point_mae", **changes):
    torch.manual_seed(0)
    return tiny_points.disturb(create(name, num_classes=5, **(TINY | changes)))


def points(dtype=torch.float32) -> torch.Tensor:
    return tiny_points.points(dtype=dtype)


def conv(state, name, x):
    return x @ state[f"{name}.weight"][..., 0].T + state[f"{name}.bias"]


def lin(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def batchnorm(state, name, x):
    x = (x - state[f"{name}.running_mean"]) / (state[f"{name}.running_var"] + 1e-5).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def by_hand(state, x, depth=2, heads=2):
    """Point-MAE's classifier in eval, from its description."""
    around, centres = point_ops.group(x, 6, 4)
    f = conv(state, "encoder.first_conv.0", around)
    f = conv(state, "encoder.first_conv.3", batchnorm(state, "encoder.first_conv.1", f).relu())
    f = torch.cat([f.max(2, keepdim=True).values.expand_as(f), f], -1)
    f = conv(state, "encoder.second_conv.0", f)
    f = conv(state, "encoder.second_conv.3", batchnorm(state, "encoder.second_conv.1", f).relu()).max(2).values
    pos = lin(state, "pos_embed.2", F.gelu(lin(state, "pos_embed.0", centres)))
    t = torch.cat([state["cls_token"].expand(len(x), -1, -1), f], 1)
    pos = torch.cat([state["cls_pos"].expand(len(x), -1, -1), pos], 1)
    for i in range(depth):
        b = f"blocks.blocks.{i}"
        t = t + pos
        q, k, v = lin(state, f"{b}.attn.qkv", norm(state, f"{b}.norm1", t)).chunk(3, -1)
        q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
        a = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        t = t + lin(state, f"{b}.attn.proj", a.transpose(1, 2).flatten(2))
        t = t + lin(state, f"{b}.mlp.fc2", F.gelu(lin(state, f"{b}.mlp.fc1", norm(state, f"{b}.norm2", t))))
    t = norm(state, "norm", t)
    y = torch.cat([t[:, 0], t[:, 1:].max(1).values], -1)
    for i in (0, 4):
        y = batchnorm(state, f"cls_head_finetune.{i + 1}", lin(state, f"cls_head_finetune.{i}", y)).relu()
    return lin(state, "cls_head_finetune.8", y)


def test_the_forward_is_that_of_its_description():
    model = tiny().double().eval()
    x = points(torch.float64)
    torch.testing.assert_close(model(x), by_hand(model.state_dict(), x), rtol=1e-11, atol=1e-11)


def test_counts_and_entries_of_the_official_models():
    with torch.device("meta"):
        model, pretraining = create("point_mae", 15), point_mae.create("point_mae", groups=64)
    assert sum(p.numel() for p in model.parameters()) == 22_093_327
    assert sum(p.numel() for p in pretraining.parameters()) == 29_006_432
    assert len(pretraining.state_dict()) == 209


def official(prefix: str, model, extra: dict | None = None, ddp: str = "module.") -> dict:
    """A checkpoint as the official code writes it."""
    state = {ddp + prefix + k: v for k, v in model.state_dict().items() if k not in HEAD}
    state |= {ddp + k: v for k, v in (extra or {}).items()}
    return {"base_model": state, "optimizer": {"state": {}, "param_groups": []}, "epoch": 300, "metrics": {}}


def test_a_pretrained_file_fills_all_but_eighteen_entries(tmp_path):
    torch.manual_seed(3)
    source = point_mae.create("point_mae", **TINY)
    path = tmp_path / "pretrain.pth"
    torch.save({"base_model": {f"module.{k}": v for k, v in source.state_dict().items()}, "epoch": 300}, path)
    model = tiny()
    missing, unused = point_checkpoints.load(model, path)
    assert len(missing) == 18 and set(missing) == HEAD
    assert {key.split(".")[0] for key in unused} == {"mask_token", "decoder_pos_embed", "MAE_decoder", "increase_dim",
                                                      } | {k.split(".")[0] for k in unused if k.startswith("blocks")}
    theirs = {k.removeprefix("MAE_encoder."): v for k, v in source.state_dict().items() if k.startswith("MAE_encoder")}
    own = model.state_dict()
    assert set(own) - set(theirs) == HEAD and all(torch.equal(own[k], v) for k, v in theirs.items())


@pytest.mark.parametrize(("name", "prefix"), [
    ("act", "ACT_encoder."), ("recon", "MAE_encoder."), ("point_mae", "base_model."), ("point_mae", ""),
    ("point_bert", "transformer_q."),
])  # fmt: skip
def test_prefixes_of_the_family(tmp_path, name, prefix):
    changes = {"encoder": 8} if name == "point_bert" else {}
    source, model = tiny(name, **changes), create(name, 5, **(TINY | changes))
    extra = {"transformer_k.norm.weight": torch.zeros(12), "img_token": torch.zeros(1, 1, 12)}
    torch.save(official(prefix, source, extra), tmp_path / "x.pth")
    missing, unused = point_checkpoints.load(model, tmp_path / "x.pth")
    assert all(k in HEAD for k in missing) and set(unused) >= set(extra)
    assert torch.equal(model.blocks.blocks[1].mlp.fc2.weight, source.blocks.blocks[1].mlp.fc2.weight)
    assert torch.equal(model.norm.weight, source.norm.weight)


def test_a_pretrained_pointgpt_fills_all_but_token_norm_and_classifier(tmp_path):
    """The pre-training model has, beside what the classifier takes, a generator, a norm and a last conv."""
    source, model = tiny("pointgpt_s"), create("pointgpt_s", 5, **TINY)
    new = ("cls_token", "cls_pos", "blocks.cls_norm", "blocks.cls_head_finetune")
    known = {k: v for k, v in source.state_dict().items() if not k.startswith(new)}
    more = {"norm.weight": torch.zeros(12), "blocks.increase_dim.0.bias": torch.zeros(12),
            "generator_blocks.layers.0.ln_1.weight": torch.zeros(12)}  # fmt: skip
    given = {f"module.GPT_Transformer.{k}": v for k, v in (known | more).items()}
    torch.save({"base_model": given}, tmp_path / "x.pth")
    missing, unused = point_checkpoints.load(model, tmp_path / "x.pth")
    own = model.state_dict()
    assert set(missing) == set(own) - set(known) and set(unused) == set(more)
    assert "sos_pos" in known and all(torch.equal(own[k], v) for k, v in known.items())


def test_a_finetuned_file_gives_the_same_outputs_and_other_classes_a_fresh_head(tmp_path):
    source = tiny().eval()
    torch.save({"base_model": {k: v for k, v in source.state_dict().items()}}, tmp_path / "x.pth")
    same = create("point_mae", 5, checkpoint=str(tmp_path / "x.pth"), **TINY).eval()
    assert torch.equal(same(points()), source(points()))
    other = create("point_mae", 7, checkpoint=str(tmp_path / "x.pth"), **TINY)
    assert other.cls_head_finetune[8].weight.shape == (7, 8)
    assert torch.equal(other.norm.weight, source.norm.weight)


class Evil:
    def __reduce__(self):
        return print, ("opened",)


def test_bad_weights_are_named(tmp_path, capsys):
    model = tiny()
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        point_checkpoints.load(model, tmp_path / "nowhere.pth")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"base_model": Evil()}))
    with pytest.raises(CheckpointError, match="without unpickling"):
        point_checkpoints.load(model, tmp_path / "evil.pth")
    assert "opened" not in capsys.readouterr().out
    torch.save({"base_model": {"encoder.first_conv.0.weight": torch.zeros(4, 3, 1)}}, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match="it has no encoder.first_conv.0.bias"):
        point_checkpoints.load(model, tmp_path / "part.pth")
    torch.save(official("", tiny(width=24, encoder=24)), tmp_path / "wide.pth")
    with pytest.raises(CheckpointError, match=r"\(24,\) there and \(12,\) here"):
        point_checkpoints.load(model, tmp_path / "wide.pth")


def test_settings_that_do_not_exist_are_named():
    with pytest.raises(VisionPEFTError, match="point_mae, act"):
        create("point_may")
    with pytest.raises(VisionPEFTError, match="'group'"):
        create("point_mae", group=4)


def test_tokens_behind_the_class_token_have_no_position():
    x, positions = torch.randn(2, 7, 4), torch.randn(2, 5, 4)
    y = point_transformer.add_positions(x, positions)
    assert torch.equal(y[:, 1:3], x[:, 1:3])
    assert torch.equal(y[:, 0], x[:, 0] + positions[:, 0]) and torch.equal(y[:, 3:], x[:, 3:] + positions[:, 1:])


def test_pretraining_learns_and_draws_its_mask_from_torch():
    torch.manual_seed(0)
    model = point_mae.create("point_mae", **(TINY | {"groups": 10, "drop_path": 0.0}))
    assert model.masked == 6
    torch.manual_seed(5)
    first = model(points())
    torch.manual_seed(5)
    assert torch.equal(first, model(points())) and first.shape == (3,)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        optimiser.zero_grad()
        model(points()).mean().backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert model(points()).mean() < 0.75 * first.mean()


def test_the_loss_is_over_the_hidden_groups_alone():
    """With guesses at the truth of all groups the loss is 0, whatever was hidden."""
    model = point_mae.create("point_mae", **TINY)
    truth = point_ops.group(points(), 6, 4)[0]
    model.guess = lambda around, centres, visible, hidden: point_ops.take(truth.flatten(2), hidden).unflatten(2, (4, 3))
    assert torch.equal(model(points()), torch.zeros(3))


def test_the_chain_goes_to_the_nearest_that_is_left():
    centres = points()[:2, :9]
    for cloud, order in zip(centres, point_gpt.chain(centres).tolist(), strict=True):
        expected = [0]
        while len(expected) < 9:
            left = [i for i in range(9) if i not in expected]
            expected.append(min(left, key=lambda i: float(((cloud[i] - cloud[expected[-1]]) ** 2).sum())))  # noqa: B023
        assert order == expected


def test_pointgpt_looks_back_only():
    block = tiny("pointgpt_s").blocks.layers[0].eval()
    x = torch.randn(2, 8, 12)
    later = x.clone()
    later[:, 5:] += 1
    assert torch.equal(block(x)[:, :5], block(later)[:, :5])
    assert not torch.equal(block(x)[:, 5:], block(later)[:, 5:])


def test_pointgpt_sequence_and_head():
    model = tiny("pointgpt_s").eval()
    around, centres = model.group_divider(points())
    batch = len(centres)
    tokens = [model.blocks.sos.expand(batch, 1, -1), model.cls_token.expand(batch, -1, -1), model.encoder(around)]
    positions = [model.cls_pos.expand(batch, -1, -1), model.sos_pos.expand(batch, -1, -1), model.pos_embed(centres)]
    h, positions = torch.cat(tokens, 1), torch.cat(positions, 1)
    for layer in model.blocks.layers:
        h = layer(h + positions)
    h = model.blocks.cls_norm(model.blocks.ln_f(h))
    pooled = torch.cat([h[:, 1], h[:, 2:].max(1).values], -1)
    torch.testing.assert_close(model(points()), model.blocks.cls_head_finetune(pooled), rtol=1e-5, atol=1e-6)


def test_sine_positions():
    module = point_gpt.SinePositions(20)  # six a coordinate, two left over
    c = points(torch.float64)[:1, :2]
    out = module(c)
    assert torch.equal(out[..., 18:], torch.zeros(1, 2, 2, dtype=torch.float64))
    for axis in range(3):
        for wave in range(3):
            angle = 2 * torch.pi * c[..., axis] / 10000 ** (2 * wave / 6)
            torch.testing.assert_close(out[..., 6 * axis + 2 * wave], angle.sin())
            torch.testing.assert_close(out[..., 6 * axis + 2 * wave + 1], angle.cos())
