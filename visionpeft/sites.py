"""Places in somebody else's model where something can be learnt.

    for site in visionpeft.inspect(model): print(site.path, site.role, site.shape)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from visionpeft import backbones, binding
from visionpeft.errors import SiteError

_OUTER = ["norm", "patch_embed", "conv", "embed", "head", "projection", "attention", "mlp", "block"]
ROLES = ["query", "key", "value", "qkv", "attn_out", "mlp_in", "mlp_out", *_OUTER]
KINDS = ("linear", "conv", "norm", "embed", "branch", "block", "stage")
_NORM_NAMES = ("norm", "affine")


@dataclass(frozen=True)
class Site:
    """One place that a method can adapt.

    Attributes:
        path: module path, e.g. "blocks.0.attn.qkv"; with several components it begins with the component's name.
        part: named rows of the module's weight ("query"), "" for all of it.
        role: what the site does, "" where the library does not say.
        kind: "linear", "conv", "norm", "embed", "branch" (a residual branch) or "block".
        shape: shape of the weight (of the part), (channels,) for branches and blocks.
        rows: rows of the part in the module's weight.
        host: path of the module that is called where a parent reads the weight itself, "." for the root; else "".
        ends: first and last module of a residual branch.
        called: False where the module is bypassed and the binding goes through its host or a switch.
    """

    path: str
    part: str = ""
    role: str = ""
    kind: str = "linear"
    shape: tuple[int, ...] = ()
    rows: tuple[int, int] | None = None
    host: str = ""
    ends: tuple[str, str] = ("", "")
    called: bool = True

    def __str__(self) -> str:
        return f"{self.path}:{self.part}" if self.part else self.path

    def row(self) -> tuple[str, ...]:
        """The site as cells of a table."""
        shape, called = "x".join(map(str, self.shape)), "yes" if self.called else "bypassed"
        return self.path or "(root)", self.part, self.role, self.kind, shape, called

    @property
    def full(self) -> str:
        """Path of the module, or of the tensor where the site is a raw one."""
        raw = self.part and (self.kind == "tensor" or self.role == "projection")
        return f"{self.path}.{self.part}".lstrip(".") if raw else self.path

    @property
    def host_path(self) -> str:
        """Path of the module that is called."""
        return "" if self.host == "." else self.host or self.path

    @property
    def place(self) -> str:
        """Key of the site's adapter at its host."""
        return self.part or self.role or "whole"


class Sites(list[Site]):
    """A list of sites that prints as a table."""

    def __repr__(self) -> str:
        rows: list[tuple[str, ...]] = [("path", "part", "role", "kind", "shape", "called")]
        rows += [s.row() for s in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    __str__ = __repr__


class Backbone:
    """The user's model seen as one or several named components.

    Attributes:
        model: what the user gave, without the wrapper of torch.compile or DDP.
        roots: component name -> module; the name is "" for a plain module.
        wrapper: name of the wrapper of data parallelism, "" without.
    """

    def __init__(self, model: Any) -> None:
        self.wrapper = ""
        while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):  # torch.compile
            compiled = hasattr(model, "_orig_mod")
            self.wrapper = self.wrapper or ("" if compiled else type(model).__name__)
            model = model._orig_mod if compiled else model.module
        self.roots: dict[str, nn.Module] = _components(model)
        self.model = self.roots.get("", model)

    def module(self, path: str) -> nn.Module:
        root, rest = self.split(path)
        return self.roots[root].get_submodule(rest)

    def split(self, path: str) -> tuple[str, str]:
        """(component, path inside it)."""
        if "" in self.roots:
            return "", path
        name, _, rest = path.partition(".")
        return name, rest

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module of the user's, once; nothing of ours."""
        seen: set[int] = set()  # modules and components may be shared
        for name, root in self.roots.items():
            yield from binding.walk(root, name, seen)

    def named_tensors(self, buffers: bool = False) -> Iterator[tuple[str, nn.Module, str]]:
        """(path of the module, module, name) of every parameter, and of every buffer if asked."""
        for path, module in self.named_modules():
            names = [n for n, p in module._parameters.items() if p is not None]
            names += [n for n, b in module._buffers.items() if b is not None] if buffers else []
            yield from ((path, module, name) for name in names)

    def heads(self) -> list[str]:
        """Paths of the classifiers, wherever the library keeps them."""
        found = []
        for name, root in self.roots.items():
            found += [".".join(p for p in (name, path) if p) for path in backbones.heads(root)]
        return found

    def towers(self) -> dict[str, list[str]]:
        """Paths of the parts of each tower ("image", "text"), of models that have them."""
        found: dict[str, list[str]] = {}
        for name, root in self.roots.items():
            for tower, paths in backbones.towers(root).items():
                found.setdefault(tower, []).extend(".".join(p for p in (name, path) if p) for path in paths)
        return found

    def in_tower(self, sites: Sequence[Site], tower: str | None) -> list[Site]:
        """The sites in a tower; all of them for None.

        Raises:
            SiteError: the model has no such tower.
        """
        if tower is None:
            return list(sites)
        towers = self.towers()
        if tower not in towers:
            here = f"it has {' and '.join(towers)}" if towers else "it has no towers: use within= with a path glob"
            raise SiteError(f"tower={tower!r}: this model has none of that name; {here}")
        return [site for site in sites if inside(site.full, towers[tower])]

    def check_tower(self, sites: Sequence[Site], tower: str | None) -> None:
        """Refuse sites outside the tower: a method that chooses by itself did not heed it."""
        if tower is not None and len(self.in_tower(sites, tower)) != len(sites):
            raise SiteError(f"tower={tower!r} is not heeded by this method's choice of sites: use within= instead")

    def sites(self, tower: str | None = None) -> Sites:
        """Every site, in the order of the modules; those of one tower if it is named."""
        return Sites(self.in_tower(self._sites(), tower))

    def _sites(self) -> Sites:
        modules = dict(self.named_modules())
        heads = self.heads()
        found = Sites()
        for path, module in modules.items():
            above = path.rpartition(".")[0]
            if self.hidden(path):
                continue
            role = "head" if inside(path, heads) else backbones.role(path, modules)
            found += _module_sites(path, module, modules.get(above) if path else None, role)
            found += _raw_sites(path, module)
            found += _block_sites(path, module)
        return found

    def hidden(self, path: str) -> bool:
        """Whether a module is a mere copy of others (fused projections), where nothing of ours belongs."""
        above, _, last = path.rpartition(".")
        root, rest = self.split(above)
        return bool(path) and root in self.roots and backbones.hidden(self.module(above), last)

    def main(self, sites: Sequence[Site]) -> list[Site]:
        """The sites that methods adapt unless told otherwise: a pipeline's denoiser, in all else every one."""
        names = [name for name, root in self.roots.items() if backbones.denoises(root)] or list(self.roots)
        return [site for site in sites if self.split(site.path)[0] in names]

    def presets(self) -> dict[str, set[str]]:
        """Words for `targets=` that libraries here know -> paths that they mean."""
        found: dict[str, set[str]] = {}
        for name, root in self.roots.items():
            modules = dict(binding.walk(root, name, set()))
            libs = {id(lib): lib for m in modules.values() if (lib := backbones.library(m)) is not None}
            for lib in libs.values():
                for word, means in lib.presets.items():
                    hits = {path for path, m in modules.items() if kind_of(m) is not None and means(path, modules)}
                    found.setdefault(word, set()).update(hits)
        return found

    def example(self) -> tuple[Any, ...] | None:
        """An input of the smallest useful size, or None where none can be built."""
        if set(self.roots) != {""}:
            return None
        return backbones.example(self.roots[""])

    def examples(self, names: Iterable[str]) -> dict[str, tuple[Any, ...]]:
        """An input for each of these components for which one can be built."""
        found = {name: backbones.example(self.roots[name]) for name in names}
        return {name: example for name, example in found.items() if example is not None}


def _components(model: Any) -> dict[str, nn.Module]:
    if isinstance(model, nn.Module):
        return {"": model}
    parts = model if isinstance(model, Mapping) else getattr(model, "components", None)
    found = {k: m for k, m in parts.items() if isinstance(m, nn.Module)} if isinstance(parts, Mapping) else {}
    if dotted := [name for name in found if "." in name]:
        raise SiteError(f"component {dotted[0]!r}: names of components have no dots")
    if not found:
        raise SiteError(f"expected an nn.Module, a dict of modules or a diffusers pipeline, got {type(model).__name__}")
    return found


def inside(path: str, roots: Sequence[str]) -> bool:
    """Whether a path is one of the roots or below one."""
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def _module_sites(path: str, module: nn.Module, parent: nn.Module | None, role: backbones.Role) -> list[Site]:
    if isinstance(parent, nn.MultiheadAttention):
        return []  # its projections are sites of the attention itself
    if _is_torch_mha(module):
        return _mha_sites(path, module)  # type: ignore[arg-type]
    kind = kind_of(module)
    if kind is None:
        return []
    role = role or (kind if kind != "linear" else "")
    shape = tuple(module.weight.shape) if getattr(module, "weight", None) is not None else ()  # type: ignore[union-attr, arg-type]
    parts = role if isinstance(role, tuple) else ()
    if parent is not None and backbones.hosts(parent, path.rpartition(".")[2]):
        return [Site(path, "", str(role), kind, shape, host=path.rpartition(".")[0] or ".", called=False)]
    called = not (parent is not None and backbones.bypasses(parent, path.rpartition(".")[2]))
    whole = ("qkv" if len(parts) == 3 else "") if parts else str(role)
    sites = [Site(path, role=whole, kind=kind, shape=shape, called=called)]
    size = shape[0] // len(parts) if parts else 0
    for i, part in enumerate(parts):
        rows = (i * size, (i + 1) * size)
        sites.append(Site(path, part, part, kind, (size, *shape[1:]), rows, called=called))
    return sites


def _is_torch_mha(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and (
        binding.base_class(module).forward is nn.MultiheadAttention.forward
    )


def _mha_sites(path: str, m: nn.MultiheadAttention) -> list[Site]:
    e, inputs = m.embed_dim, (m.embed_dim, m.kdim or m.embed_dim, m.vdim or m.embed_dim)
    sites = [
        Site(path, part, part, "linear", (e, width), (i * e, (i + 1) * e), host=path or ".", called=False)
        for i, (part, width) in enumerate(zip(("query", "key", "value"), inputs, strict=True))
    ]
    out = f"{path}.out_proj" if path else "out_proj"
    return [*sites, Site(out, "", "attn_out", "linear", (e, e), host=path or ".", called=False)]


def _raw_sites(path: str, module: nn.Module) -> list[Site]:
    """Tensors that the module itself uses as weights: fused projections (3d, d), or P (in, out) in x @ P."""
    found = []
    for name, role in backbones.raw(module).items():
        out, width = module._parameters[name].shape  # type: ignore[union-attr]
        if isinstance(role, str):
            found.append(Site(path, name, role, "linear", (width, out), host=path or ".", called=False))
            continue
        size = out // len(role)
        found += [
            Site(path, part, part, "linear", (size, width), (i * size, (i + 1) * size), path or ".", called=False)
            for i, part in enumerate(role)
        ]
    return found


def _block_sites(path: str, module: nn.Module) -> list[Site]:
    found = []
    at = f"{path}." if path else ""
    for role, (first, last, width) in backbones.branches(module).items():
        found.append(Site(path, role, role, "branch", (width,), ends=(at + first, at + last)))
    tokens = backbones.block_width(module)
    if tokens:
        found.append(Site(path, "", "block", "block", (tokens,)))
    if (stage := backbones.stage(module)) is not None:
        found.append(Site(path, "", stage[0], "stage", (stage[1],)))
    return found


def kind_of(module: nn.Module) -> str | None:
    """The kind of a leaf module, None for containers and for what no method adapts."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "conv"
    if isinstance(module, nn.Embedding):
        return "embed"
    weight = module._parameters.get("weight")
    named = any(n in type(module).__name__.lower() for n in _NORM_NAMES)
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)) or (
        named and weight is not None and weight.dim() == 1
    ):
        return "norm" if weight is not None else None
    return None


def inspect(model: Any) -> Sites:
    """Every site of a model, printed as a table: path, part, role, kind, shape, called or bypassed."""
    return Backbone(model).sites()
