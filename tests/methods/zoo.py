"""Small backbones of every kind, and what each method can do on them.

A new method needs no entry here: what it needs follows from its `kinds`, its defaults are its hyper-parameters.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import visionpeft as vp

CLASSES = 5


class Encoder(nn.Module):
    """torch's own encoder layers, which take a fast path past their children in eval."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def _timm(name: str, **kwargs: Any) -> nn.Module:
    import timm

    small = {"input_size": (3, 32, 32), "fixed_input_size": False}
    return timm.create_model(name, num_classes=CLASSES, pretrained_cfg_overlay=small, **kwargs)


def _bit() -> nn.Module:
    from timm.models.resnetv2 import _create_resnetv2_bit

    small = {"input_size": (3, 32, 32), "fixed_input_size": False}
    return _create_resnetv2_bit("resnetv2_50x1_bit", layers=(1, 1), channels=(128, 128), stem_chs=32,
                                num_classes=CLASSES, pretrained_cfg_overlay=small)  # fmt: skip


def _efficientnet() -> nn.Module:
    """Depthwise, grouped (2 groups of 8) and same-padded convs."""
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    arch = [["ds_r1_k3_s2_e1_c8_se0.25"], ["ir_r1_k3_s2_e2_c16_se0.25_gs8"], ["cn_r1_k1_s1_c16"]]
    model = EfficientNet(decode_arch_def(arch), num_classes=CLASSES, stem_size=8, num_features=16, pad_type="same")
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    return model


def _clip() -> nn.Module:
    from open_clip.model import CLIP

    vision = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    return CLIP(16, vision, {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2})


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
_SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}

def _points() -> nn.Module:
    from visionpeft.models.point_transformer import create

    model = create("point_mae", CLASSES, groups=8, group_size=4, width=24, depth=2, heads=2, encoder=24, hidden=(4, 8),
                   head="plain", head_width=8, drop_path=0.0)  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: _timm("vit_tiny_patch16_224", **_VIT),
    "dinov2": lambda: _timm("vit_small_patch14_reg4_dinov2", **_VIT),
    "eva02": lambda: _timm("eva02_tiny_patch14_224", **_VIT),
    "beit": lambda: _timm("beit_base_patch16_224", **_VIT),
    "swinv2": lambda: _timm("swinv2_tiny_window8_256", drop_path_rate=0.0, **_SWIN),
    "convnext": lambda: _timm("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "resnet": lambda: _timm("resnet18", layers=[1, 1, 1, 1], channels=(8, 8, 16, 16), stem_width=8),
    "bit": _bit,
    "nfnet": lambda: _timm("test_nfnet", drop_path_rate=0.0),
    "efficientnet": _efficientnet,
    "encoder": Encoder,
    "clip": _clip,
    "points": _points,
}

# What a budget buys: an adapter, single entries and whole vectors.
ALLOCATION: dict[str, Any] = {
    "method": vp.LoRA(rank=2), "structured": ("blocks.0.attn.qkv:query", "blocks.1.mlp.fc1"),
    "sparse": {"blocks.0.attn.qkv:key": [0, 5, 77], "blocks.0.attn.proj": [3, 100, 575], "blocks.1.mlp.fc2": [8, 2303]},
    "vectors": ("blocks.0.norm1.weight", "blocks.1.mlp.fc1.bias"),
}  # fmt: skip

# Methods for point clouds only.
POINTS = ("pointgst", "idpt", "dapt", "ppt", "point_peft")

# What each offers. `test_refusals` holds this against `vp.inspect`.
_TOKENS = {"linear", "norm", "conv", "attention", "mlp", "block", "head"}
OFFERS: dict[str, set[str]] = {
    "vit": _TOKENS,
    "dinov2": _TOKENS,
    "eva02": _TOKENS - {"block"} | {"grid"},
    "beit": _TOKENS - {"block"} | {"grid"},
    "swinv2": _TOKENS - {"block", "attention"} | {"grid"},
    "convnext": {"linear", "norm", "conv", "head", "map"},
    "resnet": {"conv", "norm", "head"},
    "bit": {"conv", "norm", "head"},
    "nfnet": {"conv", "head"},
    "efficientnet": {"conv", "norm", "head"},
    "encoder": {"linear", "norm", "head"},
    "clip": _TOKENS - {"head", "block"} | {"embed"},
    "points": _TOKENS | {"grouping", "tokens", "pool"},
}

# One of each inner tuple is needed. Others need one of their `kinds`; methods without kinds act on any tensor.
NEEDS: dict[str, tuple[set[str], ...]] = {
    **dict.fromkeys(POINTS, ({"grouping"},)),
    "ln_tuning": ({"norm"},),
    "linear": ({"head"},),
    "adaptformer": ({"mlp"},),
    "pfeiffer": ({"mlp"},),
    "houlsby": ({"attention"}, {"mlp"}),
    "parallel": ({"mlp"},),
    "convpass": ({"attention"}, {"mlp"}),
    "compacter": ({"attention"}, {"mlp"}),
    "mosa": ({"mlp"},),
    "binary_adaptformer": ({"mlp"},),
    "prefix": ({"block"},),
    "noah": ({"block"},),
    "rein": ({"block", "map", "grid"},),
}

# Methods that act in the same way as others run on a plain ViT and on those where they act in yet another way.
ONLY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(POINTS, ("points",)),
    "fact_tt": ("vit", "swinv2", "encoder"),
    "fact_tk": ("vit", "convnext"),
    "convpass": ("vit", "dinov2", "clip"),
    "parallel": ("vit", "swinv2"),
    "repadapter": ("vit", "convnext"),
    "hydra": ("vit", "clip"),
    "prefix": ("vit",),
    "compacter": ("vit",),
    "mosa": ("vit", "swinv2"),
    "rein": ("vit", "dinov2", "eva02", "swinv2", "convnext"),
    "noah": ("vit",),
    "linear_adapter": ("vit",),
    "spt": ("vit",),
    "binary_adaptformer": ("vit",),
    "binary_lora": ("vit", "encoder"),
    "block_lora": ("vit", "clip"),
    "difffit": ("vit", "swinv2", "resnet", "clip"),
    "krona": ("vit", "swinv2", "clip"),
    "orthogonal": ("vit", "clip"),
    "svfit": ("vit",),
    "shira": ("vit", "clip"),
    "textual_inversion": ("clip",),
}

# Hyper-parameters that fit the tiny widths; whatever is not named here keeps its default.
SMALL: dict[str, Any] = {"rank": 2, "hidden": 4, "tokens": 3, "dropout": 0.0, "a1": 2, "a2": 4, "experts": 1,
                         "first": 5, "initial": (5,)}  # fmt: skip

# A LayerNorm of two numbers is a sign, which no precision is enough for.
OWN: dict[str, dict[str, Any]] = {"pointgst": {"rank": 6}}

# Methods that change the number of tokens or whole blocks act wholly or not at all.
WHOLE = {*POINTS[1:], "vpt", "prefix", "rein", "noah", "textual_inversion"}

# torch's attention is replaced by another one of the same formula: equal to tolerance, not to the bit.
INEXACT = ("encoder", "clip")


class Case(NamedTuple):
    method: str
    backbone: str

    def __str__(self) -> str:
        return f"{self.method}-{self.backbone}"

    @property
    def exact(self) -> bool:
        return self.backbone not in INEXACT


def needs(method: str) -> tuple[set[str], ...]:
    if method in NEEDS:
        return NEEDS[method]
    kinds = set(METHODS[method].kinds)
    if "branch" in kinds:
        kinds |= {"attention", "mlp"}
    return (kinds,) if kinds else ()


def acts(method: str, backbone: str) -> bool:
    return all(need & OFFERS[backbone] for need in needs(method))


METHODS = vp.METHODS | vp.methods.ALLOCATED
ALL = [Case(method, backbone) for method in METHODS for backbone in MAKERS]
CASES = [case for case in ALL if acts(*case) and case.backbone in ONLY.get(case.method, MAKERS)]
REFUSED = [case for case in ALL if not acts(*case)]


def home(method: str) -> Case:
    """The method on a backbone where it acts."""
    return Case(method, "points" if method in POINTS else "clip" if method == "textual_inversion" else "vit")


def on(*backbones: str) -> list[Case]:
    return [case for case in CASES if case.backbone in backbones]


@functools.cache
def _original(backbone: str) -> nn.Module:
    torch.manual_seed(7)
    model = MAKERS[backbone]()
    with torch.no_grad():  # nothing stays at zero or one, where mistakes would not show
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(std=0.2)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return model.eval()


def plain(backbone: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh copy of the backbone, in eval, always with the same weights."""
    return copy.deepcopy(_original(backbone)).to(dtype)


def base(backbone: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the frozen backbone gives for `inputs`. Frozen, for torch's attention runs other kernels otherwise."""
    return see(plain(backbone, dtype).requires_grad_(False), inputs(backbone, dtype))


def inputs(backbone: str, dtype: torch.dtype = torch.float32, batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    if backbone == "encoder":
        return (torch.randn(batch, 6, 16, generator=generator).to(dtype),)
    if backbone == "points":
        return (torch.randn(batch, 24, 3, generator=generator).to(dtype),)
    image = torch.randn(batch, 3, 32, 32, generator=generator).to(dtype)
    if backbone == "clip":
        return image, torch.randint(1, 20, (batch, 8), generator=generator)
    return (image,)


def run(model: Any, x: tuple[Tensor, ...]) -> Tensor:
    """All outputs as one vector."""
    out = model(*x)
    return torch.cat([t.reshape(-1) for t in (out if isinstance(out, tuple) else (out,))])


@torch.no_grad()
def see(model: Any, x: tuple[Tensor, ...]) -> Tensor:
    return run(model, x)


def loss(out: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, out.numel()).to(out.dtype)
    return (out * weights).sum() + out.square().mean()


def method(key: str, **fields: Any) -> Any:
    cls = METHODS[key]
    fields = (ALLOCATION if key == "spt" else {}) | fields
    own = {f.name for f in dataclasses.fields(cls)}
    return cls(**{k: v for k, v in SMALL.items() if k in own} | OWN.get(key, {}) | fields)


def tune(case: Case, model: nn.Module | None = None, *, name: str = "default", train: bool = True,
         shake: bool = True, **fields: Any) -> tuple[nn.Module, vp.Tuner]:  # fmt: skip
    """An adapted backbone. `train`: with its head, if it has one; `shake`: every learnt tensor moved off its start."""
    model = plain(case.backbone) if model is None else model
    torch.manual_seed(11)
    head = "head" if train and "head" in OFFERS[case.backbone] else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the classifier|.* rests now")
        tuner = vp.attach(model, method(case.method, **fields), name=name, train=head)
    if shake:
        disturb(tuner)
    return model, tuner


@torch.no_grad()
def disturb(tuner: vp.Tuner, seed: int = 1, size: float = 0.1) -> None:
    """Every learnt tensor away from where it is, by the same numbers for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for p in tuner.parameters():
        p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p), alpha=size)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of b."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def gradients(model: nn.Module, tuner: vp.Tuner, x: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Gradient of every learnt tensor, by its name in the model."""
    model.zero_grad(set_to_none=True)
    loss(run(model, x)).backward()
    wanted = {id(p) for p in tuner.parameters()}
    found = {name: p.grad for name, p in model.named_parameters() if id(p) in wanted}
    assert len(found) == len(wanted), "a learnt tensor is not registered in the model"
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def step(model: nn.Module, tuner: vp.Tuner, x: tuple[Tensor, ...], lr: float = 0.05) -> None:
    """One step of Adam, which moves every tensor that has a gradient."""
    optimiser = torch.optim.Adam(tuner.parameters(), lr=lr)
    optimiser.zero_grad()
    loss(run(model, x)).backward()
    optimiser.step()


def snapshot(model: nn.Module, ours: bool = True) -> dict[str, Any]:
    """All that must be the same again after detach, down to the identity of the objects; `ours`: our holders too."""
    state = model.state_dict()
    seen: dict[str, Any] = {"keys": list(state), "values": [v.clone() for v in state.values()]}
    for path, module in model.named_modules():
        if not ours and "peft" in path.split("."):
            continue
        own = {k: v for k, v in module.__dict__.items() if isinstance(v, (bool, int, float, str, tuple, type(None)))}
        children = [name for name in module._modules if ours or name != "peft"]
        seen[f"module {path}"] = (type(module), id(module), own, children, list(module._buffers))
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        seen[f"hooks {path}"] = [list(h) for h in hooks]
    for name, p in model.named_parameters(remove_duplicate=False):
        seen[f"parameter {name}"] = (type(p), id(p), p.data_ptr(), p.requires_grad, p.grad is None)
    for name, b in model.named_buffers(remove_duplicate=False):
        if not ours and "peft" in name.split("."):
            continue
        seen[f"buffer {name}"] = (id(b), b.data_ptr())
    return seen


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert list(before) == list(after)
    for key in before:
        if key == "values":
            assert all(torch.equal(a, b) for a, b in zip(before[key], after[key], strict=True)), "a tensor changed"
        else:
            assert before[key] == after[key], key
