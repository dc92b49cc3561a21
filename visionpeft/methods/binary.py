r"""Adapters of one bit a weight (Jie et al. 2023, arXiv 2307.16867; official code JieShibo/PETL-ViT, binary_adapter).

    W_1 = c sign((W - m) / d) d + m,    m, d mean and deviation of W, c = 0.6745 the median of a half-normal

stands for every matrix W, none of which has a bias; gradients pass the sign as if it were not there, and m and d too.

    BinaryAdaptFormer   x + z + s Up_1 dropout(ReLU(Down_1 x))          beside the MLP, x the stream
    BinaryLoRA          y + s B_1 dropout(A_1 u)                        on query and value; merges

A file holds bits and the two moments in single precision: numel / 8 + 8 bytes a matrix, the first weight in the lowest
bit. Loaded, the output is the same to the bit in single precision, and training goes on from weights of these signs and
moments; the magnitudes behind the bits are gone. `binary_head=True` puts such a matrix without bias in the place of the
classifier (instead of train="head"). Near the identity at the start, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft import lowrank
from visionpeft.adapter import Adapter, Forgiving, Method, factory
from visionpeft.errors import SiteError
from visionpeft.methods.roles import there
from visionpeft.sites import Backbone, Site

MEDIAN = 0.6744897501960817  # the third quartile of N(0, 1)


@dataclass(frozen=True)
class Binary(Method):
    """What the two have in common.

    Attributes:
        scale: s, searched among 0.01 to 100 for each task in the paper.
        dropout: probability, between the two matrices.
        binary_head: replace the classifier by one of one bit a weight.
    """

    scale: float = 1.0
    dropout: float = 0.1
    binary_head: bool = False

    def choose(self, backbone: Backbone) -> list[Site]:
        sites = super().choose(backbone)
        if not self.binary_head:
            return sites
        heads = [s for s in backbone.sites() if s.role == "head" and s.kind == "linear" and s not in sites]
        if not heads:
            raise SiteError("binary_head=True: the model has no classifier: create it with num_classes")
        return sites + heads

    def refuses(self, site: Site, module: nn.Module) -> str | None:
        if self.binary_head and site.role == "head":
            return None
        return super().refuses(site, module)

    def build(self, site: Site, module: nn.Module) -> Adapter:
        kw = factory(module)
        if self.binary_head and site.role == "head":
            return BinaryHead(site.shape, **kw)
        return self.body(site, **kw)

    def body(self, site: Site, **kw: Any) -> Adapter:
        raise NotImplementedError


@dataclass(frozen=True)
class BinaryAdaptFormer(Binary):
    """
    Attributes:
        hidden: width of the bottleneck; 32 or 1 in the paper.
    """

    key: ClassVar[str] = "binary_adaptformer"
    kinds: ClassVar[frozenset[str]] = frozenset({"branch"})

    hidden: int = 32

    def default_targets(self, backbone: Backbone) -> str:
        return "mlp"

    def body(self, site: Site, **kw: Any) -> Adapter:
        return BinaryBranch(self, self.hidden, *site.shape, *site.shape, **kw)


@dataclass(frozen=True)
class BinaryLoRA(Binary):
    """
    Attributes:
        rank: 32 or 1 in the paper.
    """

    key: ClassVar[str] = "binary_lora"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    rank: int = 32

    def default_targets(self, backbone: Backbone) -> str:
        return there(self, backbone, "query value")

    def body(self, site: Site, **kw: Any) -> Adapter:
        return BinaryDelta(self, self.rank, *site.shape, **kw)


class Bits(Forgiving):
    """weight (out, in), of which the signs and the moments are used.

    Buffer offset (2): what is added to mean and deviation. It is zero, and after loading a file the rounding error of
    weights that were made to have its moments.
    """

    offset: Tensor

    def __init__(self, out: int, width: int, **kw: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, width, **kw))
        self.register_buffer("offset", torch.zeros(2, **kw))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation (unbiased); summed in double precision where the device has it."""
        wide = self.weight if self.weight.device.type == "mps" else self.weight.double()
        mean, deviation = wide.mean() + self.offset[0], wide.std() + self.offset[1]
        return mean.to(self.weight.dtype), deviation.to(self.weight.dtype)

    def forward(self) -> Tensor:
        mean, deviation = self.moments()
        normal = (self.weight - mean) / (deviation + 1e-5)
        code = ((normal >= 0).to(normal.dtype) * 2 - 1) * MEDIAN
        return (code + (normal - normal.detach())) * deviation + mean

    def pack(self) -> dict[str, Tensor]:
        """bits (ceil(numel / 8)) uint8, moments (2) float32."""
        mean, deviation = self.moments()
        bits = (self.weight >= mean).flatten().to(torch.uint8)
        bits = F.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
        places = 2 ** torch.arange(8, device=bits.device, dtype=torch.uint8)
        return {"bits": (bits * places).sum(1, dtype=torch.uint8), "moments": torch.stack((mean, deviation)).float()}

    def unpack(self, bits: Tensor, moments: Tensor) -> None:
        """Weights of these signs and moments."""
        places = torch.arange(8, device=bits.device, dtype=torch.uint8)
        signs = (bits[:, None] >> places & 1).flatten()[: self.weight.numel()].to(self.weight.device)
        signs = signs.double().view_as(self.weight) * 2 - 1
        spread = signs.std().clamp_min(1e-30)
        mean, deviation = moments.to(self.weight.device, torch.float64)
        self.weight.copy_(mean + deviation * (signs - signs.mean()) / spread)
        wide = self.weight.double()
        self.offset.copy_(torch.stack((mean - wide.mean(), deviation - wide.std())))


class Packed(Adapter):
    """An adapter whose children are `Bits`."""

    def file_tensors(self) -> dict[str, Tensor]:
        children: Any = self.named_children()
        return {f"{name}.{key}": value for name, child in children for key, value in child.pack().items()}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        children: Any = self.named_children()
        for name, child in children:
            child.unpack(tensors[f"{name}.bits"], tensors[f"{name}.moments"])


class BinaryPair(Packed):
    """down (hidden, in), up (out, hidden)."""

    def __init__(self, method: Binary, hidden: int, out: int, width: int, **kw: Any) -> None:
        super().__init__()
        self.scale, self.dropout = method.scale, method.dropout
        self.down, self.up = Bits(hidden, width, **kw), Bits(out, hidden, **kw)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.trunc_normal_(self.up.weight, std=0.001, a=-0.002, b=0.002)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.act(lowrank.linear(x, self.down().to(x.dtype), None, [], route=self.route))
        h = F.dropout(h, self.dropout, self.training)
        return y + self.scale * F.linear(h, self.up().to(h.dtype)).to(y.dtype)

    def act(self, x: Tensor) -> Tensor:
        return x


class BinaryBranch(BinaryPair):
    def act(self, x: Tensor) -> Tensor:
        return F.relu(x)


class BinaryDelta(BinaryPair):
    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        if self.training and self.dropout:
            return None  # entries are dropped between the two
        return self.down(), self.up(), self.scale

    def weight(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w + self.scale * (self.up() @ self.down()), b


class BinaryHead(Packed):
    """matrix (classes, D) instead of the classifier and its bias."""

    def __init__(self, shape: tuple[int, ...], **kw: Any) -> None:
        super().__init__()
        self.matrix = Bits(*shape, **kw)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.matrix.weight, a=math.sqrt(5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return lowrank.linear(x, self.matrix().to(x.dtype), None, [], route=self.route).to(y.dtype)

    def weight(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.matrix(), None if b is None else torch.zeros_like(b)
