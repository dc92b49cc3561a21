"""Point transformers of width 12 and clouds for them."""

from __future__ import annotations

import torch
from torch import nn

TINY = {"groups": 8, "group_size": 4, "width": 12, "depth": 2, "heads": 2, "encoder": 12, "hidden": (4, 8),
        "head_width": 8, "drop_path": 0.0}  # fmt: skip


def points(batch: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(batch, 40, 3, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
def disturb(model: nn.Module) -> nn.Module:
    """No weight and no statistic of a norm stays where it starts, where mistakes would not show."""
    for p in model.parameters():
        p.add_(torch.randn_like(p), alpha=0.2)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return model
