"""torch's own transformer layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from visionpeft.backbones import Library


def _switches(module: nn.Module, child: str) -> dict[str, Any]:
    # In eval the layer takes a fused path past its children unless it believes its activation to be unknown, and the
    # encoder packs padded tokens into a nested tensor that only the fused path can read.
    if isinstance(module, nn.TransformerEncoder):
        return {"use_nested_tensor": False}
    return {"activation_relu_or_gelu": 0} if isinstance(module, nn.TransformerEncoderLayer) else {}


LIBRARY = Library(
    name="torch",
    roles=(("Transformer(En|De)coderLayer", {"linear1": "mlp_in", "linear2": "mlp_out"}),),
    switches=_switches,
)
