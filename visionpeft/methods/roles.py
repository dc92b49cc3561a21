"""Default targets by role."""

from __future__ import annotations

from visionpeft.errors import SiteError
from visionpeft.sites import Backbone


def there(method: object, backbone: Backbone, roles: str) -> str:
    """Those of the roles that the backbone has.

    Raises:
        SiteError: it has none of them.
    """
    known = {site.role for site in backbone.sites()}
    if not (found := [role for role in roles.split() if role in known]):
        raise SiteError(f"{type(method).__name__} adapts linear sites of the roles {roles}: there are none here")
    return " ".join(found)


def attention_first(backbone: Backbone) -> str:
    """All projections of attention; else the MLP layers, else every Linear."""
    known = {site.role for site in backbone.sites()}
    choices = ("query key value attn_out", "qkv attn_out", "mlp_in mlp_out")
    return next((roles for roles in choices if set(roles.split()) <= known), "linear")
