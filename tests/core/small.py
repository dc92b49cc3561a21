"""Models of a few hundred numbers for the core."""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visionpeft as vp


class Net(nn.Module):
    """x (N, 8) -> (N, 3); no library knows it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.fc2 = nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(F.gelu(self.norm(self.fc1(x)))))


class ReadsAround(Net):
    """Uses the weight of fc2 without calling it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(F.gelu(self.norm(self.fc1(x))), self.fc2.weight, self.fc2.bias))


class ReadsAroundInEval(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else ReadsAround.forward(self, x)


class ReadsAroundInTrain(Net):
    def forward(self, x: Tensor) -> Tensor:
        return ReadsAround.forward(self, x) if self.training else super().forward(x)


class Detaches(Net):
    """Calls fc1, but nothing learns through it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(F.gelu(self.norm(self.fc1(x).detach()))))


def vit(classes: int = 10, **more: object) -> nn.Module:
    small = dict(img_size=32, embed_dim=48, depth=2, num_heads=3)
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **{**small, **more}).eval()


def image(batch: int = 2, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size)


def lora(model: nn.Module, memory: str, **fields: object) -> vp.Tuner:
    """LoRA on every Linear with the head; all that learns is drawn, the same each time."""
    tuner = vp.attach(model, vp.LoRA(rank=4, targets="linear", **fields), train="head", memory=memory, probe=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in tuner.parameters():
            p.normal_(0, 0.1, generator=generator)
    return tuner
