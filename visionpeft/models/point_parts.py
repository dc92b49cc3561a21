"""Part segmentation with the Point-MAE family: a part for every point (Pang et al. 2022, arXiv 2203.06604).

    model = create("point_mae", parts=50, categories=16, checkpoint="pretrain.pth")
    model(points)              # (B, N, 4): x y z and the number of the shape's category -> logits (B, parts, N)

Normed patch tokens behind the thirds of the blocks (4, 8 and 12 of twelve) stand beside one another. Their maximum and
mean and an embedding of the category are what every point knows of the whole; of its place it knows these features at
the three nearest centres, by inverse squared distance, through two layers. Names and counts are the official code's
(27,063,730 numbers with 50 parts), so that its checkpoints load. There is no class token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft.errors import VisionPEFTError
from visionpeft.models.point_ops import PointError, check_cloud, interpolate
from visionpeft.models.point_transformer import Architecture, PointEncoder, configure, reset


class Propagation(nn.Module):
    """Features (B, G, C) of centres (B, G, 3) at points (B, N, 3), which go in too: (B, widths[-1], N)."""

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        pairs = list(zip((channels, *widths[:-1]), widths, strict=True))
        self.mlp_convs = nn.ModuleList(nn.Conv1d(before, after, 1) for before, after in pairs)
        self.mlp_bns = nn.ModuleList(nn.BatchNorm1d(after) for _, after in pairs)

    def forward(self, points: Tensor, centres: Tensor, features: Tensor) -> Tensor:
        x = torch.cat([points, interpolate(points, centres, features)], -1).transpose(1, 2)
        for conv, norm in zip(self.mlp_convs, self.mlp_bns, strict=True):
            x = F.relu(norm(conv(x)))
        return x


class PartTransformer(PointEncoder):
    """Points (B, N, 4), x y z and the number of the category, -> logits (B, parts, N).

    With a single category the fourth column may be left out. The head's widths go by the architecture's head_width h,
    256 in the official code: 4 D and 4 h in the propagation, 2 h and h behind it, h / 4 for the category.
    """

    def __init__(self, architecture: Architecture, parts: int, categories: int) -> None:
        super().__init__(architecture)
        a, self.num_classes, self.categories = architecture, parts, categories
        self.levels = tuple(a.depth * third // 3 - 1 for third in (1, 2, 3))
        h, deep = a.head_width, len(self.levels) * a.width
        self.label_conv = nn.Sequential(
            nn.Conv1d(categories, h // 4, 1, bias=False), nn.BatchNorm1d(h // 4), nn.LeakyReLU(0.2)
        )
        self.propagation_0 = Propagation(deep + 3, (4 * a.width, 4 * h))
        self.convs1, self.bns1 = nn.Conv1d(4 * h + 2 * deep + h // 4, 2 * h, 1), nn.BatchNorm1d(2 * h)
        self.dp1 = nn.Dropout(0.5)
        self.convs2, self.bns2 = nn.Conv1d(2 * h, h, 1), nn.BatchNorm1d(h)
        self.convs3 = nn.Conv1d(h, parts, 1)
        self.apply(reset)

    def forward_features(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Points (B, N, 3) -> features (B, G, 3 D) and their centres (B, G, 3)."""
        check_cloud(points)
        neighbourhoods, centres = self.group_divider(points)
        x, positions = self.tokens(neighbourhoods), self.pos_embed(centres)
        found = []
        for i, block in enumerate(self.blocks.blocks):
            x = block(x, positions, centres)
            if i in self.levels:
                found.append(self.norm(x)[:, -centres.shape[1] :])  # prompts stand before the patches
        return torch.cat(found, -1), centres

    def forward(self, points: Tensor) -> Tensor:
        points, category = self._split(points)
        features, centres = self.forward_features(points)
        whole = torch.cat([features.amax(1), features.mean(1), self._embedded(category, features)], 1)
        near = self.propagation_0(points, centres, features)
        x = torch.cat([near, whole.unsqueeze(-1).expand(-1, -1, near.shape[-1])], 1)
        x = self.dp1(F.relu(self.bns1(self.convs1(x))))
        return self.convs3(F.relu(self.bns2(self.convs2(x))))

    def _embedded(self, category: Tensor, like: Tensor) -> Tensor:
        one_hot = F.one_hot(category, self.categories).to(like.dtype)
        return self.label_conv(one_hot.unsqueeze(-1)).squeeze(-1)

    def _split(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates (B, N, 3) and categories (B).

        Raises:
            PointError: no category is given and there are several, or one that there is not.
        """
        if points.dim() == 3 and points.shape[-1] == 4 and points.shape[1]:
            category = points[:, 0, 3].long()
            if not (points.is_meta or torch.compiler.is_compiling()):
                self._check(category)
            return points[..., :3], category
        if self.categories > 1:
            raise PointError(
                f"expected points (batch, points, 4), got {tuple(points.shape)}: x y z, and for the whole cloud the "
                f"number of its category, 0 to {self.categories - 1}"
            )
        return points, torch.zeros(points.shape[0], dtype=torch.long, device=points.device)

    def _check(self, category: Tensor) -> None:
        wrong = (category < 0) | (category >= self.categories)
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise PointError(f"cloud {at} has category {int(category[at])}, outside 0 to {self.categories - 1}")


def create(name: str, parts: int = 50, categories: int = 16, checkpoint: str | None = None,
           **changes: Any) -> PartTransformer:  # fmt: skip
    """Make a model that tells parts apart, in train mode; arguments as in `point_transformer.create`.

    Raises:
        VisionPEFTError: no such name or field, or an architecture for which there is no such head.
        CheckpointError: weights that do not fit.
    """
    architecture = configure(name, changes)
    if architecture.family != "mae" or architecture.depth < 3:
        raise VisionPEFTError(f"{name}: parts are told apart by models of Point-MAE's kind with three blocks or more")
    model = PartTransformer(architecture, parts, categories)
    if checkpoint is not None:
        from visionpeft.models.point_checkpoints import load

        load(model, checkpoint)
    return model
