"""Masked auto-encoding of clouds: what pre-trains the encoder (Pang et al. 2022, arXiv 2203.06604).

A random share of the tokens is left out, the encoder sees the rest, a small decoder guesses the points of the groups
left out; the loss is Chamfer-L2 within each group. Names and counts are the official pre-training model's: 209 entries,
29,006,432 parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionpeft.models.point_ops import chamfer, check_cloud, take
from visionpeft.models.point_transformer import (
    Architecture,
    Block,
    Group,
    MiniPointNet,
    TransformerEncoder,
    configure,
    position_mlp,
    reset,
)


class MaskedEncoder(nn.Module):
    """Encoder of the visible groups."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.encoder = MiniPointNet(a.hidden, a.encoder)
        self.pos_embed = position_mlp(a.width)
        self.blocks = TransformerEncoder(a.width, a.depth, a.heads, a.drop_path)
        self.norm = nn.LayerNorm(a.width)

    def forward(self, neighbourhoods: Tensor, centres: Tensor, visible: Tensor) -> Tensor:
        """Groups (B, G, K, 3), centres (B, G, 3), indices of the visible (B, V) -> tokens (B, V, D)."""
        x, seen = take(self.encoder(neighbourhoods), visible), take(centres, visible)
        return self.norm(self.blocks(x, self.pos_embed(seen), seen))


class Decoder(nn.Module):
    """Blocks over visible and masked tokens; gives the last `count`, which are the masked."""

    def __init__(self, width: int, depth: int, heads: int, drop_path: float) -> None:
        super().__init__()
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(width, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, positions: Tensor, count: int) -> Tensor:
        for block in self.blocks:
            x = block(x, positions)
        return self.norm(x[:, -count:])


class PointMAE(nn.Module):
    """Clouds (B, N, 3) -> loss of each cloud (B)."""

    def __init__(self, architecture: Architecture, mask: float = 0.6, decoder_depth: int = 4) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.masked = int(mask * a.groups)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, a.width))
        self.group_divider = Group(a.groups, a.group_size)
        self.MAE_encoder = MaskedEncoder(a)
        self.decoder_pos_embed = position_mlp(a.width)
        self.MAE_decoder = Decoder(a.width, decoder_depth, a.heads, a.drop_path)
        self.increase_dim = nn.Sequential(nn.Conv1d(a.width, 3 * a.group_size, 1))
        self.apply(reset)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, points: Tensor) -> Tensor:
        check_cloud(points)
        neighbourhoods, centres = self.group_divider(points)
        order = torch.rand(centres.shape[:2], device=points.device).argsort(1)
        hidden, visible = order[:, : self.masked], order[:, self.masked :]
        guesses = self.guess(neighbourhoods, centres, visible, hidden)
        truth = take(neighbourhoods.flatten(2), hidden).view_as(guesses)
        return chamfer(guesses.flatten(0, 1), truth.flatten(0, 1)).view(len(points), -1).mean(1)

    def guess(self, neighbourhoods: Tensor, centres: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Points (B, M, K, 3) of the hidden groups, given indices of visible (B, V) and hidden (B, M)."""
        x = self.MAE_encoder(neighbourhoods, centres, visible)
        x = torch.cat([x, self.mask_token.expand(len(x), hidden.shape[1], -1)], 1)
        positions = self.decoder_pos_embed(take(centres, torch.cat([visible, hidden], 1)))
        x = self.MAE_decoder(x, positions, hidden.shape[1])
        return self.increase_dim(x.transpose(1, 2)).transpose(1, 2).unflatten(2, (-1, 3))


def create(name: str = "point_mae", **changes: object) -> PointMAE:
    """The pre-training model of an architecture; the official one has groups=64."""
    return PointMAE(configure(name, changes))
