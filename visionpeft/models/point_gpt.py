"""PointGPT (Chen et al. 2023, arXiv 2305.11487; official code CGuangyan-BIT/PointGPT) as a classifier.

Patches go in an order, each followed by its nearest one not yet used, through causal blocks. These take their first
norm into the residual stream: x = ln_1(x); x = x + attn(x); x = x + mlp(ln_2(x)). Sine positions. The generator, which
is only for pre-training and for the official recipe's second loss, is left out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from visionpeft.models.point_ops import check_cloud, square_distances, take
from visionpeft.models.point_transformer import (
    Architecture,
    Group,
    MiniPointNet,
    Pool,
    add_positions,
    make_head,
    reset,
)


@torch.no_grad()
def chain(centres: Tensor) -> Tensor:
    """An order (B, G) of centres (B, G, 3): from the first, always to the nearest that is left."""
    distances = square_distances(centres, centres)
    last = torch.zeros(len(centres), 1, dtype=torch.long, device=centres.device)
    used = torch.zeros(distances.shape[:2], dtype=torch.bool, device=centres.device)
    order = [last]
    for _ in range(centres.shape[1] - 1):
        used = used.scatter(1, last, True)
        row = take(distances, last)[:, 0].masked_fill(used, torch.inf)
        last = row.argmin(1, keepdim=True)
        order.append(last)
    return torch.cat(order, 1)


class OrderedGroup(Group):
    """Groups in the order of `chain`."""

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        around, centres = super().forward(points)
        order = chain(centres)
        return take(around.flatten(2), order).view_as(around), take(centres, order)


class SinePositions(nn.Module):
    """Sines and cosines of centres (B, G, 3) -> (B, G, width); what three does not divide stays zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.each = width, width // 3 // 2 * 2

    def forward(self, centres: Tensor) -> Tensor:
        index = torch.arange(self.each, device=centres.device).div(2, rounding_mode="floor")
        waves = (centres * 2 * math.pi).unsqueeze(-1) / 10000.0 ** (2 * index / self.each)
        both = torch.stack([waves[..., 0::2].sin(), waves[..., 1::2].cos()], -1)
        return nn.functional.pad(both.flatten(-3).to(centres.dtype), (0, self.width - 3 * self.each))


class GPTBlock(nn.Module):
    """Causal block on x (B, T, D) with the mask (T, T), True where a token may not look."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.ln_2 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, positions: Tensor | None = None, centres: Tensor | None = None) -> Tensor:
        x = self.ln_1(add_positions(x, positions))
        ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        x = x + self.attn(x, x, x, attn_mask=ahead, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Extractor(nn.Module):
    """The blocks and the classifier, under one name as in the official code."""

    def __init__(self, a: Architecture, num_classes: int) -> None:
        super().__init__()
        self.sos = nn.Parameter(torch.zeros(a.width))
        self.layers = nn.ModuleList(GPTBlock(a.width, a.heads) for _ in range(a.depth))
        self.ln_f = nn.LayerNorm(a.width)
        self.cls_norm = nn.LayerNorm(a.width)
        self.pool = Pool(a.width)
        self.cls_head_finetune = make_head(a.head, a.width, a.head_width, num_classes)

    def forward(self, x: Tensor, positions: Tensor, centres: Tensor) -> Tensor:
        """Tokens (B, 1 + G, D) and positions (B, 2 + G, D) -> normed tokens (B, 1 + G, D)."""
        x = torch.cat([self.sos.expand(len(x), 1, -1), x], 1)
        for layer in self.layers:
            x = layer(x, positions, centres)
        return self.cls_norm(self.ln_f(x))[:, 1:]


class PointGPT(nn.Module):
    """Classifier of clouds (B, N, 3) -> (B, num_classes).

    The sequence is [start, class, patches] and the positions are [class, start, centres], as in the official code.
    """

    def __init__(self, architecture: Architecture, num_classes: int) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.num_classes = num_classes
        self.group_divider = OrderedGroup(a.groups, a.group_size)
        self.encoder = MiniPointNet(a.hidden, a.encoder)
        self.pos_embed = SinePositions(a.width)
        self.blocks = Extractor(a, num_classes)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, a.width))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, a.width))
        self.sos_pos = nn.Parameter(torch.zeros(1, 1, a.width))
        self.apply(reset)
        for token in (self.cls_token, self.cls_pos):
            nn.init.trunc_normal_(token, std=0.02)
        nn.init.normal_(self.blocks.sos)

    def get_classifier(self) -> nn.Module:
        return self.blocks.cls_head_finetune

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh head."""
        a, self.num_classes = self.architecture, num_classes
        head = make_head(a.head, a.width, a.head_width, num_classes).apply(reset)
        self.blocks.cls_head_finetune = head.to(self.cls_token.device, self.cls_token.dtype)

    def forward_features(self, points: Tensor) -> Tensor:
        """Normed tokens (B, 1 + G, D): class and patches."""
        check_cloud(points)
        neighbourhoods, centres = self.group_divider(points)
        x = self.encoder(neighbourhoods)
        batch = len(x)
        x = torch.cat([self.cls_token.expand(batch, -1, -1), x], 1)
        front = [self.cls_pos.expand(batch, -1, -1), self.sos_pos.expand(batch, -1, -1)]
        return self.blocks(x, torch.cat([*front, self.pos_embed(centres)], 1), centres)

    def forward(self, points: Tensor) -> Tensor:
        return self.blocks.cls_head_finetune(self.blocks.pool(self.forward_features(points)))
