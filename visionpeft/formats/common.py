"""What all formats share: an adapter as changes of weights, names of components, and the way back to a tuner."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from visionpeft import attaching, backbones, state
from visionpeft.adapter import Adapter
from visionpeft.binding import base_class
from visionpeft.errors import AdapterFileError, FormatError
from visionpeft.methods.krona import KronA, KronAdapter
from visionpeft.methods.lora import LoRA, LoRAAdapter
from visionpeft.sites import Backbone, Site
from visionpeft.tuner import Tuner


@dataclass(frozen=True)
class LowRank:
    """The weight at `path` changes by up @ down, scale included: down (r, in, *kernel), up (out, r)."""

    path: str
    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Kron:
    """The weight at `path` changes by w1 ⊗ w2, scale included."""

    path: str
    w1: Tensor
    w2: Tensor


Change = LowRank | Kron
Where = Mapping[str, str | tuple[str, ...]]
"""Names in files -> path in the model, or several paths where a name does not say which is meant."""


# ---- out of a tuner -------------------------------------------------------------------------------------------------


@torch.no_grad()
def changes(tuner: Tuner, kron: bool = False, tables: bool = False) -> list[Change]:
    """Every change of a weight that the adapter makes, one a module, in single precision; its scale is in it.

    Args:
        kron: leave Kronecker products as they are; otherwise they become exact LoRAs.
        tables: take changes of embeddings too; otherwise they are refused.

    Raises:
        FormatError: something of the adapter is no change of a weight of low rank, or of tensors that learn in place.
    """
    if tuner.memory == "reversible":
        raise FormatError(f"{tuner.name!r} was attached with memory='reversible', which no other format can say")
    if tuner.in_place:
        path, name = tuner.in_place[0]
        raise FormatError(
            f"{tuner.name!r} has tensors of the model that learnt in place ({path}.{name}, {len(tuner.in_place)} in "
            "all): this format holds changes of weights only. tuner.save() keeps them, tuner.merge() writes them in"
        )
    found: dict[str, list[tuple[Site, Change]]] = {}
    for site, adapter in tuner.adapters.items():
        if site.kind == "embed" and not tables:
            raise FormatError(f"{site}: an embedding, whose LoRA no reader of this format takes; formats.peft has it")
        change = _change(site, adapter, tuner.scale)
        if isinstance(change, Kron) and (not kron or site.rows):
            change = exact_lora(change)
        found.setdefault(site.path, []).append((site, change))
    return [_whole(tuner.backbone.module(path), parts) for path, parts in found.items()]


def _change(site: Site, adapter: Adapter, scale: float) -> Change:
    kind = type(adapter).__name__
    if site.host:
        raise FormatError(f"{site}: inside an attention of torch, whose weight other tools do not adapt in rows")
    if isinstance(adapter, KronAdapter):
        return Kron(site.path, _single(adapter.a), _single(adapter.b) * scale)
    if isinstance(adapter, LoRAAdapter):
        return LowRank(site.path, _single(adapter.a), _single(adapter.b) * adapter.scale * scale)
    if (pair := adapter.low_rank()) is not None:
        return LowRank(site.path, _single(pair[0]), _single(pair[1]) * pair[2] * scale)
    raise FormatError(f"{site}: {kind} is not a change of low rank of a weight, and this format knows no other")


def _single(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # sharded by FSDP2
    return whole.detach().to("cpu", torch.float32).contiguous()


def _whole(module: nn.Module, parts: Sequence[tuple[Site, Change]]) -> Change:
    """Rows of one weight put together: query, key and value of a fused projection."""
    (site, change), *rest = parts
    if not rest and site.rows is None:
        return change
    out: int = module.weight.shape[0]  # type: ignore[index, assignment]
    ups = []
    for site, change in parts:
        assert isinstance(change, LowRank) and site.rows is not None
        up = change.up.new_zeros(out, change.rank)
        up[slice(*site.rows)] = change.up
        ups.append(up)
    downs = [change.down for _, change in parts if isinstance(change, LowRank)]
    return LowRank(site.path, torch.cat(downs), torch.cat(ups, 1))


def exact_lora(change: Kron) -> LowRank:
    """A Kronecker product as a LoRA: (Ua Sa Va) ⊗ (Ub Sb Vb) = (Ua Sa ⊗ Ub Sb)(Va ⊗ Vb), of rank rank(A) rank(B)."""
    ua, va = _factors(change.w1)
    ub, vb = _factors(change.w2)
    down, up = torch.kron(va, vb), torch.kron(ua, ub)
    return LowRank(change.path, down.float().contiguous(), up.float().contiguous())


def _factors(w: Tensor) -> tuple[Tensor, Tensor]:
    """U S (m, r) and V^T (r, n), without the singular values that are nothing."""
    u, s, v = torch.linalg.svd(w.double(), full_matrices=False)
    r = max(1, int((s > 1e-7 * s.max()).sum()))
    return u[:, :r] * s[:r], v[:r]


def tell_growth(tuner: Tuner, found: Iterable[Change]) -> None:
    """Say how much a KronA grew by becoming a LoRA."""
    lora = sum(c.down.numel() + c.up.numel() for c in found if isinstance(c, LowRank))
    own = sum(a.a.numel() + a.b.numel() for a in tuner.adapters.values() if isinstance(a, KronAdapter))
    if own:
        warnings.warn(
            f"KronA is written as the exact LoRA: {lora:,} numbers instead of {own:,} ({lora / own:.1f} times)",
            stacklevel=3,
        )


def write(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """One safetensors file, all or nothing."""
    data = {key: value.contiguous() for key, value in tensors.items()}
    state._write(Path(path), safetensors.torch.save(data, {"format": "pt", **header}))


# ---- names ----------------------------------------------------------------------------------------------------------


def component(root: nn.Module) -> str:
    """What a pipeline calls a module of this kind."""
    name = base_class(root).__name__
    if name.startswith("UNet"):
        return "unet"
    if backbones.denoises(root):
        return "transformer"
    return "text_encoder" if "Text" in name or name.startswith("T5") else ""


def names(backbone: Backbone) -> dict[str, tuple[str, str]]:
    """Path of every module that a change may be at -> (component, path in it as diffusers' files write it).

    transformers took `text_model.` out of the paths of CLIP's text encoder; files have it.
    """
    found = {}
    for site in backbone.sites():
        if site.kind not in ("linear", "conv", "embed") or site.path in found:
            continue
        root, rest = backbone.split(site.path)
        kind = base_class(backbone.roots[root]).__name__
        if kind == "CLIPTextModel" and not rest.startswith("text_model."):
            rest = f"text_model.{rest}"
        found[site.path] = (root or component(backbone.roots[root]), rest)
    return found


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file.

    Raises:
        FormatError: it is none.
    """
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise FormatError(f"{path}: no readable safetensors file ({error})") from error


def by_module(tensors: Mapping[str, Tensor], suffixes: Sequence[str], path: str | Path) -> dict[str, dict[str, Tensor]]:
    """Tensors by the name of their module, then by suffix.

    Raises:
        FormatError: a key ends in something else, with what that is.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        suffix = next((s for s in suffixes if key.endswith(f".{s}")), None)
        if suffix is None:
            raise FormatError(f"{path}: {key} cannot be expressed here: known are {', '.join(suffixes)}")
        found.setdefault(key.removesuffix(f".{suffix}"), {})[suffix] = value
    return found


def by_rest(backbone: Backbone) -> dict[str, str | tuple[str, ...]]:
    """Path inside a component -> path in the model, or all of them where several components have it."""
    found: dict[str, list[str]] = {}
    for own in names(backbone):
        found.setdefault(backbone.split(own)[1], []).append(own)
    return {rest: own[0] if len(own) == 1 else tuple(own) for rest, own in found.items()}


def located(modules: Iterable[str], where: Where, path: str | Path) -> dict[str, str]:
    """Name in the file -> path in the model.

    Raises:
        FormatError: the model has no module of that name, with the first ones; or several.
    """
    modules = list(modules)
    if twice := [m for m in modules if isinstance(where.get(m), tuple)]:
        raise FormatError(
            f"{path}: {twice[0]} is in {' and in '.join(where[twice[0]])}: give the component that the file is for"
        )
    if lost := [m for m in modules if m not in where]:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise FormatError(
            f"{path}: made for another model: {', '.join(lost[:3])}{more} (of {len(modules)} modules) are not here. If "
            "it is for several components, give the pipeline and not one of them"
        )
    return {m: str(where[m]) for m in modules}


def low_rank(path: str, down: Tensor, up: Tensor, scale: float) -> LowRank:
    """A change out of a file's two tensors: a conv's `up` is (out, r, 1, 1) there."""
    if up.shape[1] != down.shape[0]:
        raise FormatError(f"{path}: {tuple(down.shape)} and {tuple(up.shape)} do not fit together")
    return LowRank(path, down.float(), up.float().flatten(1) * scale)


# ---- into a model ---------------------------------------------------------------------------------------------------


def attach(model: Any, found: Sequence[Change], name: str | None, path: str | Path, probe: bool = True) -> Tuner:
    """Attach what a file holds; it acts at once. Kronecker products of one shape come as KronA, all else as LoRA.

    Raises:
        FormatError: a tensor does not fit its module.
    """
    backbone = Backbone(model)
    name = name or Path(path).stem.replace(".", "_")
    attaching.check_name(backbone, name)
    if not found:
        raise FormatError(f"{path}: there is no adapter in it")
    shapes = {tuple(c.w1.shape) if isinstance(c, Kron) else None for c in found}
    shape = shapes.pop() if len(shapes) == 1 else None
    if shape is None:
        found = [exact_lora(c) if isinstance(c, Kron) else c for c in found]
    here = {s.path: s for s in backbone.sites() if not s.part and s.kind in ("linear", "conv", "embed")}
    by_site = {here[c.path]: c for c in found}
    method = _lora(found) if shape is None else KronA(a1=shape[0], a2=shape[1])
    for site, change in by_site.items():
        _check(site, change, path)
    sites = list(by_site)
    attaching.check_sites(method, sites, backbone)
    built = method.adapters(sites, backbone)
    with torch.no_grad():
        for site, change in by_site.items():
            a, b = (change.w1, change.w2) if isinstance(change, Kron) else (change.down, change.up)
            own: Any = built[site]
            own.a.copy_(a.view(own.a.shape))
            own.b.copy_(b)
    return attaching.bind(Tuner(backbone, method, name, sites), built, [], [], probe=probe)


def _lora(found: Sequence[Change]) -> LoRA:
    ranks = {c.path: c.rank for c in found if isinstance(c, LowRank)}
    most = statistics.mode(ranks.values())
    return LoRA(rank=most, ranks={p: r for p, r in ranks.items() if r != most} or None)


def _check(site: Site, change: Change, path: str | Path) -> None:
    if isinstance(change, Kron):
        shape = tuple(a * b for a, b in zip(change.w1.shape, change.w2.shape, strict=True))
    else:
        shape = (change.up.shape[0], *change.down.shape[1:])
    if shape != site.shape and not (len(site.shape) == 4 and shape == site.shape[:2] == site.shape[:2] and
                                    site.shape[2:] == (1, 1)):  # fmt: skip
        raise FormatError(f"{path}: {site} is {'x'.join(map(str, site.shape))} here, {'x'.join(map(str, shape))} there")


__all__ = ["AdapterFileError", "Change", "Kron", "LowRank", "Where", "attach", "by_module", "by_rest", "changes",
           "component", "exact_lora", "located", "low_rank", "names", "read", "tell_growth", "write"]  # fmt: skip
