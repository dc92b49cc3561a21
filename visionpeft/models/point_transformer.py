"""The transformer of the Point-MAE family in plain torch: groups of points become tokens (Pang et al. 2022, arXiv
2203.06604; official code Pang-Yatian/Point-MAE).

    model = create("point_mae", num_classes=15, checkpoint="pretrain.pth");  model(points)  # (B, N, 3) -> (B, 15)

Farthest-point centres with their nearest neighbours, a small PointNet on each group, positions of the centres added
before every block, pre-norm blocks, and a head on the class token beside the maximum over the patches. Modules are
named as in the official code, so that its checkpoints load; `create` has the configurations of the family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft.errors import VisionPEFTError
from visionpeft.models.point_ops import check_cloud, group


@dataclass(frozen=True)
class Architecture:
    """Sizes of one model.

    Attributes:
        groups, group_size: tokens of a cloud, and points in each. 64 groups for 1,024 points (ModelNet), 128 for
            2,048 (ScanObjectNN, ShapeNetPart).
        width, depth, heads: of the transformer.
        encoder: width of the small PointNet's output; another than `width` brings Point-BERT's `reduce_dim`.
        hidden: widths of the small PointNet's two stages.
        drop_path: of the last block; rising from 0.
        head: "bn" is Point-MAE's, three Linears with BatchNorm; "plain" is Point-BERT's, two without.
        family: "mae" or "gpt".
    """

    groups: int = 128
    group_size: int = 32
    width: int = 384
    depth: int = 12
    heads: int = 6
    encoder: int = 384
    hidden: tuple[int, ...] = (128, 256)
    drop_path: float = 0.1
    head: str = "bn"
    head_width: int = 256
    family: str = "mae"


_MAE = Architecture()
_GPT = replace(_MAE, family="gpt")
_LARGE = (256, 512, 1024)
ARCHITECTURES: dict[str, Architecture] = {
    "point_mae": _MAE,
    "act": _MAE,
    "recon": _MAE,
    "point_bert": replace(_MAE, encoder=256, head="plain"),
    "pointgpt_s": _GPT,
    "pointgpt_b": replace(_GPT, width=768, encoder=768, heads=12, hidden=_LARGE),
    "pointgpt_l": replace(_GPT, width=1024, encoder=1024, depth=24, heads=16, hidden=_LARGE, drop_path=0.2),
    "nano_point_mae": Architecture(groups=32, group_size=16, width=128, depth=6, heads=4, encoder=128,
                                   hidden=(64, 128), drop_path=0.0, head_width=64),
}  # fmt: skip


class DropPath(nn.Module):
    """Drops whole samples of a residual branch in training, and scales the others up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


class Group(nn.Module):
    """Points (B, N, 3) -> neighbourhoods (B, G, K, 3) relative to their centres, centres (B, G, 3)."""

    def __init__(self, num_group: int, group_size: int) -> None:
        super().__init__()
        self.num_group, self.group_size = num_group, group_size

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        return group(points, self.num_group, self.group_size)


def _stage(widths: tuple[int, ...]) -> nn.Sequential:
    """1x1 convs with BatchNorm and ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Conv1d(before, after, 1), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv1d(widths[-2], widths[-1], 1))


class MiniPointNet(nn.Module):
    """One feature for each group of points: (B, G, K, 3) -> (B, G, C)."""

    def __init__(self, hidden: tuple[int, ...], channels: int) -> None:
        super().__init__()
        double = 2 * hidden[-1]
        self.first_conv = _stage((3, *hidden))
        self.second_conv = _stage((double, double, channels))

    def forward(self, groups: Tensor) -> Tensor:
        batch, count = groups.shape[:2]
        x = self.first_conv(groups.flatten(0, 1).transpose(1, 2))
        highest = x.amax(2, keepdim=True).expand_as(x)
        x = self.second_conv(torch.cat([highest, x], 1)).amax(2)
        return x.view(batch, count, -1)


class Attention(nn.Module):
    """Multi-head self-attention with a fused projection without bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two Linears and GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def add_positions(x: Tensor, positions: Tensor | None, front: int = 1) -> Tensor:
    """Tokens x (B, T, D) plus positions (B, P, D) of the class token (the first `front`) and of the last P - `front`.

    Tokens between these (prompts, which stand behind the class token) have no position.
    """
    if positions is None:
        return x
    more = x.shape[1] - positions.shape[1]
    if more == 0:
        return x + positions
    back = front + more
    return torch.cat([x[:, :front] + positions[:, :front], x[:, front:back], x[:, back:] + positions[:, front:]], 1)


def in_front(positions: Tensor | None, centres: Tensor | None) -> int:
    """How many positions are not of patches with a centre: one class token, or none where parts are told apart."""
    return 1 if positions is None or centres is None else min(1, positions.shape[1] - centres.shape[1])


class Block(nn.Module):
    """Pre-norm transformer block on tokens x (B, T, D).

    It adds the positions first. The centres of the patches are for adapters, which see all that a block is given.
    """

    def __init__(self, width: int, heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor, positions: Tensor | None = None, centres: Tensor | None = None) -> Tensor:
        x = add_positions(x, positions, in_front(positions, centres))
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class TransformerEncoder(nn.Module):
    """Blocks in turn; each is given the positions anew."""

    def __init__(self, width: int, depth: int, heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(width, heads, rate) for rate in rates)

    def forward(self, x: Tensor, positions: Tensor, centres: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, positions, centres)
        return x


class Pool(nn.Module):
    """Tokens (B, 1 + G, D) -> class token beside the maximum over the others (B, 2 D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, 0], x[:, 1:].amax(1)], 1)


def position_mlp(width: int) -> nn.Sequential:
    """Positions of centres: (..., 3) -> (..., width)."""
    return nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))


def make_head(kind: str, width: int, hidden: int, classes: int) -> nn.Sequential:
    """The classifier on pooled features (B, 2 width)."""
    if kind == "plain":
        return nn.Sequential(nn.Linear(2 * width, hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, classes))
    layers: list[nn.Module] = []
    for before in (2 * width, hidden):
        layers += [nn.Linear(before, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(hidden, classes))


def reset(module: nn.Module) -> None:
    """The family's random start: weights normal of deviation 0.02 cut at two of its units, biases zero."""
    if isinstance(module, (nn.Linear, nn.Conv1d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class PointEncoder(nn.Module):
    """What classifiers of clouds and of their points have in common: groups, their tokens and positions, blocks."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.group_divider = Group(a.groups, a.group_size)
        self.encoder = MiniPointNet(a.hidden, a.encoder)
        if a.encoder != a.width:
            self.reduce_dim = nn.Linear(a.encoder, a.width)
        self.pos_embed = position_mlp(a.width)
        self.blocks = TransformerEncoder(a.width, a.depth, a.heads, a.drop_path)
        self.norm = nn.LayerNorm(a.width)

    def tokens(self, neighbourhoods: Tensor) -> Tensor:
        """Groups (B, G, K, 3) -> tokens (B, G, D)."""
        x = self.encoder(neighbourhoods)
        return self.reduce_dim(x) if hasattr(self, "reduce_dim") else x


class PointTransformer(PointEncoder):
    """Classifier of clouds (B, N, 3) -> (B, num_classes); `forward_features` gives the normed tokens (B, 1 + G, D)."""

    def __init__(self, architecture: Architecture, num_classes: int) -> None:
        super().__init__(architecture)
        a, self.num_classes = architecture, num_classes
        self.cls_token = nn.Parameter(torch.zeros(1, 1, a.width))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, a.width))
        self.pool = Pool(a.width)
        self.cls_head_finetune = make_head(a.head, a.width, a.head_width, num_classes)
        self.apply(reset)
        for token in (self.cls_token, self.cls_pos):
            nn.init.trunc_normal_(token, std=0.02)

    def get_classifier(self) -> nn.Module:
        return self.cls_head_finetune

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh head."""
        a, self.num_classes = self.architecture, num_classes
        like = self.cls_token
        self.cls_head_finetune = make_head(a.head, a.width, a.head_width, num_classes).apply(reset)
        self.cls_head_finetune.to(like.device, like.dtype)

    def forward_features(self, points: Tensor) -> Tensor:
        check_cloud(points)
        neighbourhoods, centres = self.group_divider(points)
        x, positions = self.tokens(neighbourhoods), self.pos_embed(centres)
        batch = len(x)
        x = torch.cat([self.cls_token.expand(batch, -1, -1), x], 1)
        positions = torch.cat([self.cls_pos.expand(batch, -1, -1), positions], 1)
        return self.norm(self.blocks(x, positions, centres))

    def forward(self, points: Tensor) -> Tensor:
        return self.cls_head_finetune(self.pool(self.forward_features(points)))


def create(name: str, num_classes: int = 40, checkpoint: str | None = None, **changes: Any) -> nn.Module:
    """Make a model of the family, in train mode.

    Args:
        name: a key of `ARCHITECTURES`; "recon" is the plain encoder that PEFT papers load ReCon's weights into.
        num_classes: width of the classifier.
        checkpoint: official weights (.pth, opened without unpickling) or .safetensors; see `point_checkpoints.load`.
        changes: fields of `Architecture`, such as groups=64.

    Raises:
        VisionPEFTError: no such name or field.
        CheckpointError: weights that do not fit.
    """
    architecture = configure(name, changes)
    model: nn.Module
    if architecture.family == "gpt":
        from visionpeft.models.point_gpt import PointGPT

        model = PointGPT(architecture, num_classes)
    else:
        model = PointTransformer(architecture, num_classes)
    if checkpoint is not None:
        from visionpeft.models.point_checkpoints import load

        load(model, checkpoint)
    return model


def configure(name: str, changes: Mapping[str, Any]) -> Architecture:
    """The architecture of a name with some fields changed."""
    if name not in ARCHITECTURES:
        raise VisionPEFTError(f"no point model is called {name!r}: choose one of {', '.join(ARCHITECTURES)}")
    known = Architecture.__dataclass_fields__
    if unknown := [key for key in changes if key not in known]:
        raise VisionPEFTError(f"{name} has no setting {unknown[0]!r}: choose among {', '.join(known)}")
    return replace(ARCHITECTURES[name], **changes)
