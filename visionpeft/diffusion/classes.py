"""New classes for a class-conditional DiT, as DiffFit fine-tunes one (arXiv 2304.06648, section 4).

The table of the old classes is replaced by a fresh one, drawn as DiT draws it, with the row for no class kept from the
old; the copies that diffusers makes of it in every block stay equal, so that `DiffFit` can train them as one. Position
embeddings need no care at another resolution: diffusers' PatchEmbed spreads those of the trained grid over any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from visionpeft.diffusion.errors import DiffusionError

DEVIATION = 0.02


@torch.no_grad()
def renew_classes(transformer: Any, classes: int, seed: int = 0) -> None:
    """Give a DiT `classes` new classes, in place.

    Args:
        transformer: a DiTTransformer2DModel.
        classes: number of classes, the row for no class not counted.
        seed: of the fresh rows.

    Raises:
        DiffusionError: no DiT, or its blocks have different tables.
    """
    tables = [m for m in transformer.modules() if type(m).__name__ == "LabelEmbedding"]
    if not tables or classes < 1:
        raise DiffusionError(f"{type(transformer).__name__} with {classes} classes: expected a DiT and at least one")
    old = tables[0].embedding_table.weight
    if any(not torch.equal(t.embedding_table.weight, old) for t in tables):
        raise DiffusionError("the blocks of this DiT have different class tables, so that no new one can stand for all")
    rows = DEVIATION * torch.randn(classes, old.shape[1], generator=torch.Generator().manual_seed(seed))
    fresh = torch.cat([rows.to(old), old[-1:]])
    for table in tables:
        table.embedding_table = nn.Embedding.from_pretrained(fresh.clone(), freeze=not old.requires_grad)
        table.num_classes = classes
    transformer.register_to_config(num_embeds_ada_norm=classes)
