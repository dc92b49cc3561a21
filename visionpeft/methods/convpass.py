r"""Convpass, convolutional bypasses (Jie and Deng 2022, arXiv 2207.07039; official code JieShibo/PETL-ViT).

In parallel with attention and MLP, from the output u of the branch's norm (q is quick GELU, t * sigmoid(1.702 t)):

    x + drop_path(branch(u)) + scale * drop_path(C(u)),    C(u) = Up dropout(q(conv3x3(q(Down u))))

Down (hidden, D), conv (hidden, hidden, 3, 3) with padding 1, Up (D, hidden), all with bias. The two drop-paths are
drawn independently. The patch tokens, which come last, are laid out on their grid; every token before them (class
token, registers, prompts) is convolved alone, so that only the centre tap acts. The grid is what the patch embedding
gives at each call: any image size and shape; Swin's blocks have that grid halved as often as their stage says. Up is
zero: identity at the start. Branches off the grid (text towers, Hiera's reordered tokens) are refused. Does not merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft import lowrank
from visionpeft.adapter import Adapter, Method, factory
from visionpeft.errors import MethodError, SiteError
from visionpeft.methods.bottleneck import quick_gelu
from visionpeft.sites import Backbone, Site


@dataclass(frozen=True)
class Convpass(Method):
    """
    Attributes:
        hidden: width of the bypass.
        attention_only: no bypass of the MLP (the paper's Convpass-attn).
        scale: s, searched among 0.01 to 100 for each task in the paper.
        dropout: probability, before Up.
        init: the conv starts as the "identity" or drawn by "xavier"; the paper chooses for each task.
    """

    key: ClassVar[str] = "convpass"
    kinds: ClassVar[frozenset[str]] = frozenset({"branch"})

    hidden: int = 8
    attention_only: bool = False
    scale: float = 1.0
    dropout: float = 0.1
    init: str = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in ("identity", "xavier"):
            raise MethodError(f"init={self.init!r}: expected 'identity' or 'xavier'")

    def default_targets(self, backbone: Backbone) -> str:
        return "attention" if self.attention_only else "attention mlp"

    def choose(self, backbone: Backbone) -> list[Site]:
        """Where targets are the paper's, those of the tower that has the image; and its patch embedding."""
        sites, every = [site for site in super().choose(backbone) if site.kind != "conv"], backbone.sites()
        embeddings = {site: _embedding(site, every, backbone) for site in sites}
        if self.targets is None:
            sites = [site for site in sites if embeddings[site] is not None]
        if not sites:
            raise SiteError("Convpass finds no block with a patch embedding here, which tells the grid of its tokens")
        return [*sites, *dict.fromkeys(e for site in sites if (e := embeddings[site]) is not None)]

    def refuses(self, site: Site, module: nn.Module) -> str | None:
        if site.role == "patch_embed":
            return None
        if (reason := super().refuses(site, module)) is not None:
            return reason
        if type(module).__name__ == "HieraBlock":
            return "Hiera's tokens do not lie in rows: there is no grid to convolve"
        attention = getattr(module, "attn", None)
        return "its tokens are not batch first" if getattr(attention, "batch_first", True) is False else None

    def adapters(self, sites: Sequence[Site], backbone: Backbone) -> dict[Site, Adapter]:
        grids: dict[Site, Grid] = {}
        found, every = dict[Site, Adapter](), backbone.sites()
        for site in (s for s in sites if s.role != "patch_embed"):
            if (embedding := _embedding(site, every, backbone)) is None:
                raise SiteError(f"Convpass at {site}: no patch embedding by a conv tells the grid of its tokens")
            drop_path = float(getattr(backbone.module(site.ends[1]), "drop_prob", None) or 0)
            found[site] = ConvpassAdapter(self, site.shape[0], drop_path, **factory(backbone.module(site.path)))
            grid = grids.setdefault(embedding, Grid())  # registered at the patch embedding
            object.__setattr__(found[site], "grid", grid)
        return {**found, **grids}


def _embedding(site: Site, every: Sequence[Site], backbone: Backbone) -> Site | None:
    """The patch embedding of the tower that a site is in."""
    component = backbone.split(site.path)[0]
    sites = [s for s in every if backbone.split(s.path)[0] == component]
    embedding = next((s for s in sites if s.role == "patch_embed" and s.kind == "conv"), None)
    if embedding is None:
        return None
    nearest = max(_together(s.path, embedding.path) for s in sites if s.kind == "branch")
    return embedding if _together(site.path, embedding.path) == nearest else None


def _together(a: str, b: str) -> int:
    """How many modules two paths have in common."""
    pairs = zip(a.split("."), b.split("."), strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), 0)


class Grid(Adapter):
    """Notes the size of the patch grid, and all sizes seen, this one last; changes nothing."""

    size: tuple[int, int] | None = None
    seen: tuple[tuple[int, int], ...] = ()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.size = size = (int(y.shape[-2]), int(y.shape[-1]))
        if not torch.compiler.is_compiling():  # where it would mean a new graph
            self.seen = (*(s for s in self.seen if s != size), size)
        return y

    def of(self, tokens: int, label: str, front: int | None = None) -> tuple[int, int]:
        """The grid of the last of so many tokens: all patches, or a quarter of them for each stage of a hierarchy.

        `front` is given where a block is computed again in backward, images of other sizes having been seen since: how
        many of its tokens stood before the grid. Then it is the last grid that leaves as many.
        """
        if self.size is None:
            raise SiteError(f"{label}: the block was called without the patch embedding, which tells its grid")
        for size in (self.size,) if front is None else reversed(self.seen or (self.size,)):
            height, width = _halved(*size, tokens)
            fits = height * width == tokens or (height * width < tokens and (height, width) == size)
            if fits and front in (None, tokens - height * width):
                return height, width
        raise SiteError(f"{label}: {tokens} tokens do not hold the grid of {self.size[0]} x {self.size[1]} patches")


def _halved(height: int, width: int, tokens: int) -> tuple[int, int]:
    """A grid halved until it has no more places than there are tokens, as long as both sides are even."""
    while height * width > tokens and height % 2 == width % 2 == 0:
        height, width = height // 2, width // 2
    return height, width


def _in_backward() -> bool:
    """Whether autograd is at work: checkpoints compute blocks again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class ConvpassAdapter(Adapter):
    """down_weight (h, D), down_bias (h), conv_weight (h, h, 3, 3), conv_bias (h), up_weight (D, h), up_bias (D)."""

    grid: Grid
    front: int | None = None  # tokens before the patches, as seen last
    normed = True

    def __init__(self, method: Convpass, width: int, drop_path: float, **kw: Any) -> None:
        super().__init__()
        h = method.hidden
        self.scale, self.dropout, self.drop_path, self.init = method.scale, method.dropout, drop_path, method.init
        self.down_weight = nn.Parameter(torch.empty(h, width, **kw))
        self.down_bias = nn.Parameter(torch.empty(h, **kw))
        self.conv_weight = nn.Parameter(torch.empty(h, h, 3, 3, **kw))
        self.conv_bias = nn.Parameter(torch.empty(h, **kw))
        self.up_weight = nn.Parameter(torch.empty(width, h, **kw))
        self.up_bias = nn.Parameter(torch.empty(width, **kw))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.down_weight)
        if self.init == "identity":
            nn.init.dirac_(self.conv_weight)
        else:
            nn.init.xavier_uniform_(self.conv_weight)
        for zero in (self.down_bias, self.conv_bias, self.up_weight, self.up_bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        dtype = x.dtype
        h = quick_gelu(lowrank.linear(x, self.down_weight.to(dtype), self.down_bias.to(dtype), [], route=self.route))
        h = quick_gelu(self._convolve(h))
        h = F.dropout(h, self.dropout, self.training)
        h = F.linear(h, self.up_weight.to(dtype), self.up_bias.to(dtype)).to(y.dtype)
        return y + self.scale * _drop_path(h, self.drop_path if self.training else 0.0)

    def _convolve(self, h: Tensor) -> Tensor:
        """h (B, N, hidden) or (B, H, W, hidden), the same back."""
        weight, bias = self.conv_weight.to(h.dtype), self.conv_bias.to(h.dtype)
        if h.dim() == 4:
            return F.conv2d(h.permute(0, 3, 1, 2), weight, bias, padding=1).permute(0, 2, 3, 1)
        height, width = self.grid.of(h.shape[1], self.label, self.front if _in_backward() else None)
        front = self.front = h.shape[1] - height * width
        patches = h[:, front:].transpose(1, 2).unflatten(-1, (height, width))
        patches = F.conv2d(patches, weight, bias, padding=1).flatten(2).transpose(1, 2)
        alone = F.linear(h[:, :front], weight[:, :, 1, 1], bias).to(patches.dtype)
        return torch.cat([alone, patches], 1)


def _drop_path(x: Tensor, p: float) -> Tensor:
    """Whole samples dropped, the others scaled up."""
    if not p:
        return x
    mask = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - p)
    return x * mask.div_(1 - p)
