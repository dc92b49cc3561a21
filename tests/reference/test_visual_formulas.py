"""The visual adapters' formulas written out on a timm block in float64, against the adapted model and its gradients."""

from __future__ import annotations

import pytest
import timm
import torch
from test_formulas import D, assert_equal, attention, compare, gelu, image, norm, shake, vit
from torch import Tensor, nn

import visionpeft as vp

M = vp.methods


def walk(model: nn.Module, x: Tensor, op=lambda path, u, y: y, attn=None, mlp=None, attend=attention,
         leave=lambda path, h: h) -> Tensor:  # fmt: skip
    """Logits of a ViT. `op(path, u, y)` follows every Linear of input u; `attn` and `mlp(path, h, u, z)` say what is
    added to the stream h, u being what the branch's norm gives and z what the branch gives; `attend(q, k, v)` stands
    for the attention, `leave(path, h)` follows every block."""
    attn, mlp = (f or (lambda path, h, u, z: z) for f in (attn, mlp))

    def linear(path: str, u: Tensor) -> Tensor:
        m = model.get_submodule(path)
        return op(path, u, u @ m.weight.T + m.bias)

    proj = model.patch_embed.proj
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    h = patches @ proj.weight.flatten(1).T + proj.bias
    h = torch.cat([model.cls_token.expand(x.shape[0], -1, -1), h], 1) + model.pos_embed
    for i, block in enumerate(model.blocks):
        p = f"blocks.{i}"
        u = norm(block.norm1, h)
        z = linear(f"{p}.attn.proj", attend(*linear(f"{p}.attn.qkv", u).split(D, -1)))
        h = h + attn(p, h, u, z)
        u = norm(block.norm2, h)
        h = h + mlp(p, h, u, linear(f"{p}.mlp.fc2", gelu(linear(f"{p}.mlp.fc1", u))))
        h = leave(p, h)
    return norm(model.norm, h)[:, 0] @ model.head.weight.T + model.head.bias


def test_the_hand_written_vit_is_timms():
    model, x = vit(), image()
    assert_equal(model(x), walk(model, x))


def by_site(tuner: vp.Tuner) -> dict[tuple[str, str], dict[str, Tensor]]:
    """(path, part) -> name -> tensor."""
    return {(s.path, s.part): dict(a.named_parameters()) for s, a in tuner.adapters.items()}


def rows_of(path: str, parts: dict[str, Tensor]) -> Tensor:
    """Deltas (B, N, out) of the parts of a fused projection put side by side."""
    return torch.cat([parts[p] for p in ("query", "key", "value")], -1)


# ---- FacT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tt", "tk"])
def test_fact(kind):
    """dW = s V S U on every D x D tile; U and V once for the network."""
    model, x = vit(), image()
    tuner = shake(vp.attach(model, {"tt": M.FacTTT, "tk": M.FacTTK}[kind](rank=3, scale=0.7)))
    own = by_site(tuner)
    shared = own["", f"factors{D}"]
    assert sum("u" in t for t in own.values()) == 1
    assert sum(k.endswith(".u") for k in model.state_dict()) == 1

    def s(path: str, part: str, tile: int, wide: bool) -> Tensor:
        t = own[path, part]
        if kind == "tt":
            part_of = slice(3 * tile, 3 * tile + 3)
            return t["core"][:, part_of] if wide else t["core"][part_of]
        found = sum(shared["core"][:, :, k] * t["p"][k, tile] for k in range(3))
        return found.T if wide else found

    def delta(path: str, part: str, u: Tensor, out: int) -> Tensor:
        pieces = u.split(D, -1)
        wide = len(pieces) > 1
        tiles = [
            sum(piece @ (shared["v"] @ s(path, part, i + j, wide) @ shared["u"]).T for j, piece in enumerate(pieces))
            for i in range(out // D)
        ]
        return 0.7 * torch.cat(tiles, -1)

    def op(path: str, u: Tensor, y: Tensor) -> Tensor:
        if path.endswith("qkv"):
            return y + rows_of(path, {p: delta(path, p, u, D) for p in ("query", "key", "value")})
        return y + delta(path, "", u, y.shape[-1])

    compare(model, walk(model, x, op), x, tuner)


def test_fact_drops_behind_s():
    """In training s V drop(S U x): with everything dropped the frozen Linear is left, though x is whole."""
    model = vit()
    shake(vp.attach(model, M.FacTTT(rank=3, dropout=1 - 1e-9)))
    linear, u = model.blocks[0].mlp.fc1.train(), torch.randn(2, 5, D, dtype=torch.float64)
    linear.peft.train()
    assert_equal(linear(u), u @ linear.weight.T + linear.bias)
    linear.peft.eval()
    assert float((linear(u) - u @ linear.weight.T - linear.bias).abs().max()) > 0.1


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_tiny"])
def test_fact_shares_by_width_in_hierarchical_backbones(name):
    small = {"swin": dict(img_size=32, window_size=4, embed_dim=24, depths=(1, 2), num_heads=(2, 4)),
             "conv": dict(depths=(1, 1, 1, 1), dims=(8, 16, 16, 16))}[name[:4]]  # fmt: skip
    tuner = vp.attach(timm.create_model(name, num_classes=0, **small), M.FacTTT(rank=4), probe=False)
    widths = (24, 48) if name.startswith("swin") else (8, 16)
    blocks = (1, 2) if name.startswith("swin") else (1, 3)
    cores = 12 if name.startswith("swin") else 8  # a ConvNeXt block has an MLP only
    assert tuner.num_parameters == sum(2 * w * 4 + n * cores * 16 for w, n in zip(widths, blocks, strict=True))
    assert sum(site.kind == "shared" for site in tuner.adapters) == 2


def test_fact_refuses_an_mlp_of_no_whole_ratio():
    model = timm.create_model("eva02_tiny_patch14_224", img_size=28, embed_dim=24, depth=1, num_heads=2)
    with pytest.raises(vp.errors.SiteError, match=r"mlp.*square tiles"):
        vp.attach(model, M.FacTTT(rank=2))


# ---- Convpass and parallel adapters ---------------------------------------------------------------------------------


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def bypass(t: dict[str, Tensor], u: Tensor, height: int, width: int) -> Tensor:
    """Up q(conv(q(Down u))), the conv as a sum over its taps, each token before the patches on an image of its own."""
    h = quick_gelu(u @ t["down_weight"].T + t["down_bias"])
    front = h.shape[1] - height * width
    grid = h.new_zeros(h.shape[0], height + 2, width + 2, h.shape[2])
    grid[:, 1:-1, 1:-1] = h[:, front:].unflatten(1, (height, width))
    w = t["conv_weight"]
    patches = sum(grid[:, i : i + height, j : j + width] @ w[:, :, i, j].T for i in range(3) for j in range(3))
    out = torch.cat([h[:, :front] @ w[:, :, 1, 1].T, patches.flatten(1, 2)], 1) + t["conv_bias"]
    return quick_gelu(out) @ t["up_weight"].T + t["up_bias"]


@pytest.mark.parametrize("only", [False, True], ids=["both", "attention"])
def test_convpass(only):
    """x + branch(u) + s C(u), u the norm's output, the class token convolved alone."""
    model, x = vit(), image()
    tuner = shake(vp.attach(model, M.Convpass(hidden=4, scale=0.7, attention_only=only)))
    own = by_site(tuner)

    def beside(part: str):
        return lambda p, h, u, z: z + 0.7 * bypass(own[p, part], u, 4, 4)

    expected = walk(model, x, attn=beside("attention"), mlp=None if only else beside("mlp"))
    compare(model, expected, x, tuner)


def test_convpass_on_any_grid_behind_any_tokens():
    """Grids that come at call time, one class token, four registers and two prompts."""
    small = dict(img_size=32, patch_size=8, embed_dim=D, depth=2, num_heads=2, num_classes=0, dynamic_img_size=True)
    model = timm.create_model("vit_small_patch14_reg4_dinov2", **small).double().eval()
    vp.attach(model, M.VPT(tokens=2), name="prompts", probe=False)
    tuner = shake(vp.attach(model, M.Convpass(hidden=4, dropout=0)))
    seen = []
    for module in (model.blocks[1].norm1, model.blocks[1].ls1, model.blocks[1].drop_path1):
        module.register_forward_hook(lambda m, i, y: seen.append(y))
    for height, width in ((3, 5), (5, 3), (4, 4)):
        seen.clear()
        model(torch.randn(2, 3, 8 * height, 8 * width, dtype=torch.float64))
        u, z, found = (t.detach() for t in seen)
        assert u.shape[1] == 1 + 4 + 2 + height * width
        assert_equal(found, z + bypass(by_site(tuner)["blocks.1", "attention"], u, height, width).detach())


def test_convpass_in_swin_where_the_grid_halves():
    small = dict(img_size=32, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(2, 2), num_classes=0)
    model = timm.create_model("swin_tiny_patch4_window7_224", **small).double().eval()
    tuner = shake(vp.attach(model, M.Convpass(hidden=4)))
    block, seen = model.layers[1].blocks[0], {}
    for name in ("norm1", "norm2", "mlp", "drop_path1", "drop_path2"):
        block.get_submodule(name).register_forward_hook(lambda m, i, y, name=name: seen.update({name: (i[0], y)}))
    adapters = {s.part: a for s, a in tuner.adapters.items() if s.path == "layers.1.blocks.0"}
    model(image())
    own = by_site(tuner)
    (_, u), (_, z), (_, found) = (seen[n] for n in ("norm2", "mlp", "drop_path2"))
    assert_equal(found.detach(), (z + bypass(own["layers.1.blocks.0", "mlp"], u, 4, 4)).detach())
    u = seen["norm1"][1]  # there the tokens keep their grid
    assert u.shape == (2, 4, 4, 16)
    beside = bypass(own["layers.1.blocks.0", "attention"], u.flatten(1, 2), 4, 4).view_as(u)
    assert_equal(adapters["attention"](u, torch.zeros_like(u)).detach(), beside.detach())


def test_convpass_leaves_the_text_tower_alone_and_refuses_it():
    from open_clip.model import CLIP

    vision = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    model = CLIP(16, vision, {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2})
    tuner = vp.attach(model, M.Convpass(hidden=4))
    assert {s.path.split(".")[0] for s in tuner.sites} == {"visual"} and len(tuner.sites) == 5
    with pytest.raises(vp.errors.SiteError, match=r"transformer\.resblocks\.0.*grid"):
        vp.attach(model, M.Convpass(hidden=4, targets="mlp"), name="b")


def test_convpass_refuses_tokens_out_of_order():
    model = timm.create_model("hiera_tiny_224", img_size=64, embed_dim=24, stages=(1, 1, 1, 1))
    with pytest.raises(vp.errors.SiteError, match=r"blocks\.0.*Hiera.*grid"):
        vp.attach(model, M.Convpass(targets="mlp"))


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_convpass_is_computed_again_on_the_grid_it_was_computed_on(name):
    """Images of several sizes, then one backward through checkpoints: gradients are those without checkpoints."""
    torch.manual_seed(0)
    if name == "vit":
        model = vit(dynamic_img_size=True)
    else:
        small = dict(img_size=32, window_size=2, embed_dim=8, depths=(1, 1), num_heads=(2, 2), drop_path_rate=0.0)
        model = timm.create_model("swin_tiny_patch4_window7_224", strict_img_size=False, **small).double()
    tuner = shake(vp.attach(model, M.Convpass(hidden=4, dropout=0), probe=False))
    images = [torch.randn(2, 3, h, w, dtype=torch.float64) for h, w in ((32, 48), (48, 16), (32, 16))]

    def gradients(checkpointed: bool) -> list[Tensor]:
        model.zero_grad()
        model.set_grad_checkpointing(checkpointed)
        loss = sum(model.train()(x).square().sum() for x in images)
        with torch.no_grad():
            model(images[1])  # and another one before backward
        loss.backward()
        return [p.grad.clone() for p in tuner.parameters()]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert_equal(found, expected)


def test_a_block_without_the_patch_embedding_has_no_grid():
    model = vit()
    vp.attach(model, M.Convpass(hidden=4), probe=False)
    with pytest.raises(vp.errors.SiteError, match="patch embedding"):
        model.blocks[0](torch.randn(1, 17, D, dtype=torch.float64))


def test_paths_of_branch_and_bypass_drop_independently():
    """In training x + dp(z) + dp'(C(u)): all four cases occur among many samples."""
    model = vit(drop_path_rate=0.5)
    tuner = shake(vp.attach(model, M.Convpass(hidden=4, dropout=0, targets="attention")))
    model(image())
    block, seen = model.blocks[1].train(), []
    for module in (block.norm1, block.ls1, block.drop_path1):
        module.register_forward_hook(lambda m, i, y: seen.append(y.detach()))
    block(torch.randn(64, 17, D, dtype=torch.float64))
    u, z, found = seen
    beside = bypass(by_site(tuner)["blocks.1", "attention"], u, 4, 4).detach()
    cases = {(a, b) for y, zi, ci in zip(found, z, beside, strict=True) for a in (0, 2) for b in (0, 2)
             if float((y - a * zi - b * ci).abs().max()) < 1e-10}  # fmt: skip
    assert cases == {(0, 0), (0, 2), (2, 0), (2, 2)}


@pytest.mark.parametrize("init", ["identity", "xavier"])
def test_convpass_starts_as_in_the_paper(init):
    tuner = vp.attach(vit(), M.Convpass(hidden=5, init=init), train="head")
    for t in filter(None, by_site(tuner).values()):
        assert not any(t[name].any() for name in ("up_weight", "down_bias", "conv_bias", "up_bias"))
        assert 0 < t["down_weight"].abs().max() <= (6 / (D + 5)) ** 0.5
        centre = torch.zeros(5, 5, 3, 3, dtype=torch.float64)
        centre[:, :, 1, 1] = torch.eye(5)
        assert torch.equal(t["conv_weight"], centre) == (init == "identity")
        assert t["conv_weight"].abs().max() <= (1 if init == "identity" else (6 / 90) ** 0.5)


def test_parallel():
    """x + MLP(u) + s Up(ReLU(Down u)), u what the MLP is given."""
    model, x = vit(), image()
    tuner = shake(vp.attach(model, M.ParallelAdapter(hidden=4, scale=1.5)))
    own = by_site(tuner)

    def mlp(p: str, h: Tensor, u: Tensor, z: Tensor) -> Tensor:
        t = own[p, "mlp"]
        return z + 1.5 * ((u @ t["down_weight"].T + t["down_bias"]).clamp(min=0) @ t["up_weight"].T + t["up_bias"])

    compare(model, walk(model, x, mlp=mlp), x, tuner)


# ---- RepAdapter and Hydra -------------------------------------------------------------------------------------------


def pair(t: dict[str, Tensor], u: Tensor, name: str = "") -> Tensor:
    """Up (Down u + b_down) + b_up."""
    return (u @ t[f"{name}down_weight"].T + t[f"{name}down_bias"]) @ t[f"{name}up_weight"].T + t[f"{name}up_bias"]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_repadapter(groups):
    """y = W (u + s B (A u + b_A) + s b_B) + b before qkv and fc1, B a grouped 1x1 conv; merged it is the same."""
    model, x = vit(), image()
    tuner = shake(vp.attach(model, M.RepAdapter(hidden=4, groups=groups, scale=0.7)))
    own = by_site(tuner)
    assert len(own) == 4

    def op(path: str, u: Tensor, y: Tensor) -> Tensor:
        if (path, "") not in own:
            return y
        t, m = own[path, ""], model.get_submodule(path)
        h = (u @ t["down_weight"].T + t["down_bias"]).transpose(1, 2)
        beside = nn.functional.conv1d(h, t["up_weight"].unsqueeze(-1), t["up_bias"], groups=groups).transpose(1, 2)
        return (u + 0.7 * beside) @ m.weight.T + m.bias

    expected = walk(model, x, op)
    compare(model, expected, x, tuner)
    tuner.merge()
    assert_equal(model(x).detach(), expected.detach())


def test_repadapter_acts_on_what_stands_before_it():
    """LoRA, RepAdapter, LoRA at one site: W2 = (W + L1)(1 + R) + L2, unmerged and merged."""
    model = vit()
    linear, u = model.blocks[0].mlp.fc1, torch.randn(2, 5, D, dtype=torch.float64)
    w, b = linear.weight.clone(), linear.bias.clone()
    methods = {"a": vp.LoRA(rank=2, targets="mlp_in"), "r": M.RepAdapter(hidden=4, targets="mlp_in"),
               "z": vp.LoRA(rank=2, targets="mlp_in")}  # fmt: skip
    tuners = {name: shake(vp.attach(model, m, name=name, probe=False)) for name, m in methods.items()}
    own = {name: by_site(t)["blocks.0.mlp.fc1", ""] for name, t in tuners.items()}
    r = own["r"]
    up = torch.block_diag(*r["up_weight"].chunk(2))
    first = w + own["a"]["b"] @ own["a"]["a"]
    expected = (u + (u @ r["down_weight"].T + r["down_bias"]) @ up.T + r["up_bias"]) @ first.T + b
    expected = expected + u @ (own["z"]["b"] @ own["z"]["a"]).T
    assert_equal(linear(u).detach(), expected.detach())
    for tuner in tuners.values():
        tuner.merge()
    assert_equal(linear(u).detach(), expected.detach())


def test_repadapter_refuses_rows_and_attention_that_reads_its_weights():
    with pytest.raises(vp.errors.SiteError, match=r"qkv:query.*whole nn\.Linear"):
        vp.attach(vit(), M.RepAdapter(targets="query"))
    with pytest.raises(vp.errors.SiteError, match=r"self_attn.*whole nn\.Linear"):
        vp.attach(nn.TransformerEncoderLayer(8, 2, 16), M.RepAdapter(targets="value"))
    with pytest.raises(vp.errors.SiteError, match="5 groups"):
        vp.attach(vit(), M.RepAdapter(hidden=5, groups=5))


def test_hydra():
    """y = f(x) + s (P(x) + S(f(x))) on proj and fc2; merged it is the same, in attention too."""
    model, x = vit(), image()
    tuner = shake(vp.attach(model, M.Hydra(rank=2, scale=0.7)))
    own = by_site(tuner)
    assert {p.rpartition(".")[2] for p, _ in own} == {"proj", "fc2"}

    def op(path: str, u: Tensor, y: Tensor) -> Tensor:
        t = own.get((path, ""))
        return y if t is None else y + 0.7 * (pair(t, u, "parallel.") + pair(t, y, "sequential."))

    expected = walk(model, x, op)
    compare(model, expected, x, tuner)
    tuner.merge()
    assert_equal(model(x).detach(), expected.detach())


@pytest.mark.parametrize("method", [M.RepAdapter(), M.Hydra()], ids=lambda m: m.key)
def test_biased_deltas_do_not_merge_where_there_is_no_bias(method):
    model = vit(qkv_bias=False, proj_bias=False)
    shake(tuner := vp.attach(model, method))
    before = model.blocks[0].attn.proj.weight
    with pytest.raises(vp.errors.MergeError, match=r"attn\.(qkv|proj).*bias"):
        tuner.merge()
    assert model.blocks[0].attn.proj.weight is before
