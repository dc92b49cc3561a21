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
