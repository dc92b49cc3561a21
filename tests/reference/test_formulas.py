"""The papers' formulas written out on a timm block in float64, whole tensors against the adapted model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visionpeft as vp

timm = pytest.importorskip("timm")

D, HEADS, DEPTH, TOKENS = 24, 2, 2, 17
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": DEPTH, "num_heads": HEADS, "num_classes": 5}


def vit(name: str = "vit_tiny_patch16_224", **kwargs) -> nn.Module:
    model = timm.create_model(name, **SMALL, **kwargs).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


@torch.no_grad()
def shake(tuner: vp.Tuner) -> vp.Tuner:
    for p in tuner.parameters():
        p.add_(torch.randn_like(p), alpha=0.3)
    return tuner


def image() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)


def assert_equal(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape and float((a - b).abs().max()) < 1e-12 * float(b.abs().max())


def compare(model: nn.Module, expected: Tensor, x: Tensor, tuner: vp.Tuner) -> None:
    """The model's output is what the formula expects, and so are the gradients of its input and of every tensor."""
    y = model(x)
    assert_equal(y, expected)
    leaves = [x, *tuner.parameters()]
    found, wanted = (torch.autograd.grad(out.square().sum(), leaves) for out in (y, expected))
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).abs().max()) < 1e-10 * float(b.abs().max())


# ---- a ViT by hand --------------------------------------------------------------------------------------------------


def norm(m: nn.Module, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (x.var(-1, unbiased=False, keepdim=True) + m.eps).sqrt() * m.weight + m.bias


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, N, D) each -> (B, N, D)."""
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def same(name: str, y: Tensor) -> Tensor:
    return y


def forward(model: nn.Module, x: Tensor, op=same, attn=same, mlp=None, enter=same, leave=same) -> Tensor:
    """Logits. `op(path, y)` follows every operation, `attn(path, z)` and `mlp(path, x, z)` the residual branches,
    `enter` and `leave` surround each block."""
    mlp = mlp or (lambda path, x, z: z)
    b = x.shape[0]
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8)  # (B, 3, 4, 4, 8, 8)
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(b, 16, -1)
    h = patches @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias
    h = op("patch_embed.proj", h)
    h = torch.cat([model.cls_token.expand(b, -1, -1), h], 1) + model.pos_embed
    for i, block in enumerate(model.blocks):
        p = f"blocks.{i}"
        h = enter(p, h)
        u = op(f"{p}.norm1", norm(block.norm1, h))
        qkv = op(f"{p}.attn.qkv", u @ block.attn.qkv.weight.T + block.attn.qkv.bias)
        z = attention(*qkv.split(D, -1))
        z = op(f"{p}.attn.proj", z @ block.attn.proj.weight.T + block.attn.proj.bias)
        h = h + attn(p, z)
        u = op(f"{p}.norm2", norm(block.norm2, h))
        u = gelu(op(f"{p}.mlp.fc1", u @ block.mlp.fc1.weight.T + block.mlp.fc1.bias))
        z = op(f"{p}.mlp.fc2", u @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
        h = h + mlp(p, h, z)
        h = leave(p, h)
    h = op("norm", norm(model.norm, h))
    return h[:, 0] @ model.head.weight.T + model.head.bias


def tensors(tuner: vp.Tuner, **where) -> dict[str, dict[str, Tensor]]:
    """path (of the sites that match) -> name -> tensor."""
    found = {}
    for site, adapter in tuner.adapters.items():
        if all(getattr(site, k) == v for k, v in where.items()):
            found[site.path] = dict(adapter.named_parameters())
    return found


def test_the_hand_written_vit_is_timms():
    model, x = vit(), image()
    assert_equal(model(x), forward(model, x))


def test_ssf():
    """y = gamma z + beta after every operation: 2 + 6 a block."""
    model, x = vit(), image()
    tuner = shake(vp.attach(model, "ssf"))
    own = tensors(tuner)
    assert len(own) == 2 + 6 * DEPTH
    used = set()

    def op(path: str, y: Tensor) -> Tensor:
        used.add(path)
        return y * own[path]["gamma"] + own[path]["beta"]

    compare(model, forward(model, x, op), x, tuner)
    assert used == set(own)


def test_ssf_starts_as_in_the_paper():
    torch.manual_seed(0)
    own = tensors(vp.attach(timm.create_model("vit_small_patch16_224", depth=2), "ssf"))
    gamma = torch.cat([t["gamma"] for t in own.values()])
    beta = torch.cat([t["beta"] for t in own.values()])
    assert abs(gamma.mean() - 1) < 0.002 and abs(gamma.std() - 0.02) < 0.001
    assert abs(beta.mean()) < 0.002 and abs(beta.std() - 0.02) < 0.001


def test_lora_on_query_and_value():
    """Rows 0..D and 2D..3D of the fused weight, each with its own pair; the scale is alpha / rank."""
    model, x = vit(), image()
    tuner = shake(vp.attach(model, vp.LoRA(rank=3, alpha=6)))
    q, v = tensors(tuner, role="query"), tensors(tuner, role="value")
    assert len(q) == len(v) == DEPTH

    def op(path: str, y: Tensor) -> Tensor:
        if path not in q:
            return y
        u = norm(model.get_submodule(path.replace("attn.qkv", "norm1")), inputs[path.removesuffix(".attn.qkv")])
        deltas = [2 * (u @ t[path]["a"].T) @ t[path]["b"].T for t in (q, v)]
        return y + torch.cat([deltas[0], torch.zeros_like(u), deltas[1]], -1)

    inputs: dict[str, Tensor] = {}

    def enter(path: str, h: Tensor) -> Tensor:
        inputs[path] = h
        return h

    compare(model, forward(model, x, op, enter=enter), x, tuner)


def bottleneck(t: dict[str, Tensor], u: Tensor, act) -> Tensor:
    return act(u @ t["down_weight"].T + t["down_bias"]) @ t["up_weight"].T + t["up_bias"]


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


@pytest.mark.parametrize("scale", [0.1, 4.0])
def test_adaptformer(scale):
    """x + MLP(LN x) + s Up(ReLU(Down x)), x the stream before the norm."""
    model, x = vit(), image()
    tuner = shake(vp.attach(model, vp.AdaptFormer(hidden=4, scale=scale)))
    own = tensors(tuner)
    compare(model, forward(model, x, mlp=lambda p, h, z: z + scale * bottleneck(own[p], h, torch.relu)), x, tuner)


def test_houlsby():
    """Behind both branches, each with an inner residual."""
    model, x = vit(), image()
    tuner = shake(vp.attach(model, vp.methods.Houlsby(hidden=4)))
    a, m = tensors(tuner, role="attention"), tensors(tuner, role="mlp")
    assert len(a) == len(m) == DEPTH
    expected = forward(model, x, attn=lambda p, z: z + bottleneck(a[p], z, gelu),
                       mlp=lambda p, h, z: z + bottleneck(m[p], z, gelu))  # fmt: skip
    compare(model, expected, x, tuner)


def test_pfeiffer():
    model, x = vit(), image()
    tuner = shake(vp.attach(model, vp.methods.Pfeiffer(hidden=4)))
    own = tensors(tuner)
    compare(model, forward(model, x, mlp=lambda p, h, z: z + bottleneck(own[p], z, quick_gelu)), x, tuner)


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_vpt(deep):
    """[CLS, P, patches]; deep: new prompts for each block, the old ones dropped; the head reads CLS."""
    model, x = vit(), image()
    tuner = shake(vp.attach(model, vp.methods.VPT(tokens=3, deep=deep)))
    own = {path: t for path, t in tensors(tuner).items() if t}
    assert list(own) == (["blocks.0", "blocks.1"] if deep else ["blocks.0"])

    def enter(path: str, h: Tensor) -> Tensor:
        if path not in own:
            return h
        return torch.cat([h[:, :1], own[path]["prompts"].expand(2, -1, -1), h[:, 1:]], 1)

    def leave(path: str, h: Tensor) -> Tensor:
        return torch.cat([h[:, :1], h[:, 4:]], 1) if deep or path == "blocks.1" else h

    compare(model, forward(model, x, enter=enter, leave=leave), x, tuner)
    features = model.forward_features(x)
    assert features.shape == (2, TOKENS, D)


def test_vpt_starts_within_the_papers_bounds():
    own = tensors(vp.attach(vit(), vp.methods.VPT(tokens=100)))
    v = math.sqrt(6 / (3 * 8 * 8 + D))
    drawn = torch.cat([t["prompts"].flatten() for t in own.values()])
    assert 0.98 * v < drawn.abs().max() <= v
    assert abs(float(drawn.std()) / (v / math.sqrt(3)) - 1) < 0.05


def test_vpt_behind_registers():
    """Prompts follow the class token, registers and patches come after."""
    model, x = vit("vit_small_patch14_reg4_dinov2"), image()
    vp.attach(model, vp.methods.VPT(tokens=3))
    seen = []
    model.blocks[0].norm1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    plain = vit("vit_small_patch14_reg4_dinov2")
    plain.load_state_dict({k: t for k, t in model.state_dict().items() if "peft" not in k})
    plain.blocks[0].norm1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(x), plain(x)
    h, base = seen
    assert torch.equal(h[:, :1], base[:, :1]) and torch.equal(h[:, 4:], base[:, 1:])
    assert torch.equal(h[:, 1:4], model.blocks[0].peft.default.block.prompts.expand(2, -1, -1))


def test_a_dropped_path_drops_the_branch_and_not_the_adapter():
    """AdaptFormer's branch has no drop-path: with every path dropped, x + s bottleneck(x) is left."""
    model = vit(drop_path_rate=0.5)
    own = tensors(shake(vp.attach(model, vp.AdaptFormer(hidden=4, dropout=0.0))))
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 1 - 1e-12
            module.scale_by_keep = False
    torch.manual_seed(0)
    block, h = model.blocks[1].train(), torch.randn(2, 5, D, dtype=torch.float64)
    assert_equal(block(h), h + 0.1 * bottleneck(own["blocks.1"], h, lambda t: t.clamp(min=0)))


@pytest.mark.parametrize("key", ["adaptformer", "houlsby", "pfeiffer"])
def test_bottlenecks_start_as_in_the_papers(key):
    own = tensors(vp.attach(vit(), vp.METHODS[key](hidden=16)))
    down, up = (torch.cat([t[n].flatten() for t in own.values()]) for n in ("down_weight", "up_weight"))
    biases = torch.cat([t[n].flatten() for t in own.values() for n in ("down_bias", "up_bias")])
    if key == "adaptformer":
        assert up.abs().max() == 0 == biases.abs().max()
        assert 0.95 / math.sqrt(D) < down.abs().max() <= 1 / math.sqrt(D)
    elif key == "houlsby":
        assert biases.abs().max() == 0 and down.abs().max() <= 0.02 and up.abs().max() <= 0.02
        assert 0.007 < down.std() < 0.01 and 0.007 < up.std() < 0.01
    else:
        bound = math.sqrt(6 / (D + 16))
        assert 0.95 * bound < down.abs().max() <= bound and 0.95 * bound < up.abs().max() <= bound
        assert 0 < biases.abs().max() < 1e-5


# ---- LoRA on convs --------------------------------------------------------------------------------------------------

CONVS = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "3d": (nn.Conv3d(2, 5, (3, 2, 1), stride=(1, 2, 1), padding=(1, 0, 0)), (2, 2, 4, 4, 3)),
    "dilated": (nn.Conv2d(3, 6, 3, padding=2, dilation=2), (2, 3, 9, 9)),
    "strided": (nn.Conv2d(3, 6, 3, stride=2), (2, 3, 9, 9)),
    "same": (nn.Conv2d(3, 6, 3, padding="same"), (2, 3, 9, 9)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 9)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 9, 9)),
    "reflecting": (nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), (2, 3, 9, 9)),
}


@pytest.mark.parametrize("name", CONVS)
def test_lora_on_a_conv_is_a_delta_of_its_weight(name):
    """W + s B A with W as a matrix (out, in / groups * k * k); gradients too."""
    conv, shape = CONVS[name]
    conv = conv.double()
    fresh = copy.deepcopy(conv)
    x = torch.randn(shape, dtype=torch.float64)
    net = nn.Sequential(conv)
    tuner = shake(vp.attach(net, vp.LoRA(rank=2, alpha=3, targets="0")))
    (adapter,) = tuner.adapters.values()
    a, b = (t.detach().clone().requires_grad_() for t in (adapter.a, adapter.b))
    w = conv.weight + 1.5 * (b @ a.flatten(1)).view_as(conv.weight)
    state = {"weight": w} if conv.bias is None else {"weight": w, "bias": conv.bias}
    expected = torch.func.functional_call(fresh, state, (x,))
    y = net(x)
    assert_equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_equal(adapter.a.grad, a.grad)
    assert_equal(adapter.b.grad, b.grad)
    tuner.detach()


@pytest.mark.parametrize("name", ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame", "Conv2dSame"])
def test_lora_on_a_treated_conv_is_a_delta_of_the_raw_weight(name):
    """What weight standardisation sees is W + delta: the delta itself is never standardised."""
    conv = getattr(timm.layers, name)(4, 6, 3, stride=2).double()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    tuner = shake(vp.attach(nn.Sequential(conv), vp.LoRA(rank=2, targets="0")))
    (adapter,) = tuner.adapters.values()
    y = tuner.model(x)
    delta = (adapter.b @ adapter.a.flatten(1)).view_as(conv.weight)
    tuner.detach()
    with torch.no_grad():
        conv.weight += delta
    assert_equal(y, conv(x))


def test_lora_on_an_embedding():
    net = nn.Sequential(nn.Embedding(7, 5)).double()
    tuner = shake(vp.attach(net, vp.LoRA(rank=2, targets="0")))
    (adapter,) = tuner.adapters.values()
    tokens = torch.tensor([[1, 6], [0, 1]])
    assert_equal(net(tokens), F.embedding(tokens, net[0].weight + adapter.b @ adapter.a))
