"""What the libraries call things: one file per library, with tables from module type to roles.

Modules are recognised by the package of their class, so that a timm block inside somebody's own model is known too.
Nothing here imports the libraries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from visionpeft.binding import Mixin, base_class

Role = str | tuple[str, ...]


def _none(*args: Any) -> None:
    return None


@dataclass(frozen=True)
class Library:
    """What is known of one library.

    Attributes:
        roles: (pattern of a class name, {path below it: role or roles of equal slices of the rows}).
        lookalike: says whether a module has a name of the table but another job.
        branches: block class, or its file and class, -> {role: (first, last module of the residual branch)}.
        blocks: says whether a module is a block that takes tokens (B, N, D) and depends on no position.
        fused: says whether the rows of a fused projection are [query, key, value] rather than interleaved by head.
        bypasses: says whether the parent reads a child's weight without calling it.
        hosts: says whether it does so and `visionpeft.hosts` has a forward of its own for it.
        raw: class -> {name of a tensor that it uses as a weight: its role, or roles of equal slices of the rows}.
        towers: "image" and "text" of a root -> paths of their parts.
        switches: {attribute: value} that make the module call the child of that name, while an adapter is there.
        guard: what the owner of the child of that name wears besides while an adapter is there.
        hidden: says whether the child of that name is a mere copy of others, so that no adapter belongs there.
        twin: name of a tensor -> what its copies in other blocks have in common, None where there are none.
        presets: word of `targets=` -> says whether it means the module at a path, given all modules.
        denoises: says whether a root is what a diffusion pipeline trains, unless told otherwise.
        heads: paths of the classifiers of a root; example: an input for it.
        stages: role and channels of a module that is no such block, but that adapters can take hold of as a whole.
        prefix_tokens: how many tokens stand before the patches.
    """

    name: str
    roles: tuple[tuple[str, Mapping[str, Role]], ...] = ()
    lookalike: Callable[[nn.Module], bool] = lambda module: False
    branches: Mapping[str, Mapping[str, tuple[str, str]]] = field(default_factory=dict)
    blocks: Callable[[nn.Module], bool] = lambda module: False
    fused: Callable[[nn.Module], bool] = lambda module: True
    bypasses: Callable[[nn.Module, str], bool] = lambda module, name: False
    hosts: Callable[[nn.Module, str], bool] = lambda module, name: False
    raw: Mapping[str, Mapping[str, Role]] = field(default_factory=dict)
    towers: Callable[[nn.Module], dict[str, list[str]]] = lambda root: {}
    switches: Callable[[nn.Module, str], dict[str, Any]] = lambda module, child: {}
    guard: Callable[[nn.Module, str], type[Mixin] | None] = lambda module, child: None
    hidden: Callable[[nn.Module, str], bool] = lambda parent, name: False
    twin: Callable[[str], str | None] = _none
    presets: Mapping[str, Callable[[str, Mapping[str, nn.Module]], bool]] = field(default_factory=dict)
    denoises: Callable[[nn.Module], bool] = lambda root: False
    heads: Callable[[nn.Module], list[str]] = lambda root: []
    stages: Callable[[nn.Module], tuple[str, int] | None] = _none
    example: Callable[[nn.Module], tuple[Any, ...] | None] = _none
    prefix_tokens: Callable[[nn.Module], int | None] = _none


def library(module: nn.Module | None) -> Library | None:
    """The library whose class a module has: a file of this library that has a table of its own, or the package."""
    if module is None:
        return None
    file = base_class(module).__module__
    return LIBRARIES.get(file) or LIBRARIES.get(file.split(".")[0])


def role(path: str, modules: Mapping[str, nn.Module]) -> Role:
    """Role of a module, a tuple of roles where it fuses several projections, "" if unknown.

    Tables name a module by its path below the module whose class tells what it is: mostly its parent, up to three
    levels up where a library wraps its projections (`proj.ln.linear`).
    """
    above, _, name = path.rpartition(".")
    for _ in range(3):
        if (parent := modules.get(above)) is not None and path and (found := _lookup(parent, name, modules[path])):
            return found
        if not above:
            break
        above, _, last = above.rpartition(".")
        name = f"{last}.{name}"
    return ""


def _lookup(parent: nn.Module, name: str, module: nn.Module) -> Role:
    lib = library(parent)
    if lib is None or lib.lookalike(parent):
        return ""
    for pattern, names in lib.roles:
        if name in names and re.search(pattern, type(parent).__name__):
            found = names[name]
            return "qkv" if isinstance(found, tuple) and not _even(lib, parent, module, found) else found
    return ""


def _even(lib: Library, parent: nn.Module, module: nn.Module, parts: tuple[str, ...]) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.shape[0] % len(parts) == 0 and lib.fused(parent)


def branches(module: nn.Module) -> dict[str, tuple[str, str, int]]:
    """Residual branches of a block: role -> (first module, last module, width of the residual stream)."""
    lib = library(module)
    if lib is None:
        return {}
    name = type(module).__name__
    source = base_class(module).__module__.split(".")[-1]
    table = lib.branches.get(f"{source}.{name}", lib.branches.get(name, {}))
    found = {}
    for name, (first, last) in table.items():
        width = width_of(getattr(module, first, None)) or width_of(module)
        if width and all(isinstance(getattr(module, end, None), nn.Module) for end in (first, last)):
            found[name] = (first, last, width)
    return found


def block_width(module: nn.Module) -> int | None:
    """D of a block that takes tokens (B, N, D) in any number, else None."""
    lib = library(module)
    return width_of(module) if lib and lib.blocks(module) else None


def width_of(module: nn.Module | None) -> int | None:
    """Width of a norm, or of a block's residual stream: that of its first norm, which every block here has."""
    for norm in (module, *module.children()) if module is not None else ():
        weight = norm._parameters.get("weight")
        if weight is not None and weight.dim() == 1:
            return weight.shape[0]
    return None


def stage(module: nn.Module) -> tuple[str, int] | None:
    """Role and channels of a stage (grouping, tokens, pool), None for all else."""
    lib = library(module)
    return lib.stages(module) if lib else None


def bypasses(parent: nn.Module, name: str) -> bool:
    lib = library(parent)
    return bool(lib and lib.bypasses(parent, name))


def hosts(parent: nn.Module, name: str) -> bool:
    lib = library(parent)
    return bool(lib and lib.hosts(parent, name))


def raw(module: nn.Module) -> dict[str, Role]:
    """Tensors that a module uses as weights by itself, and their roles."""
    lib = library(module)
    table = lib.raw.get(type(module).__name__, {}) if lib else {}
    return {name: role for name, role in table.items() if module._parameters.get(name) is not None}


def towers(root: nn.Module) -> dict[str, list[str]]:
    """Paths of the parts of the image and of the text tower, {} where there are none."""
    lib = library(root)
    return lib.towers(root) if lib else {}


def switches(module: nn.Module, child: str) -> dict[str, Any]:
    lib = library(module)
    return lib.switches(module, child) if lib else {}


def guard(module: nn.Module, child: str) -> type[Mixin] | None:
    lib = library(module)
    return lib.guard(module, child) if lib else None


def hidden(parent: nn.Module | None, name: str) -> bool:
    lib = library(parent)
    return bool(lib and parent is not None and lib.hidden(parent, name))


def twin(name: str) -> str | None:
    """What the copies of a tensor have in common that a library makes of one of the original model's."""
    return next((found for lib in LIBRARIES.values() if (found := lib.twin(name)) is not None), None)


def denoises(root: nn.Module) -> bool:
    lib = library(root)
    return bool(lib and lib.denoises(root))


def heads(root: nn.Module) -> list[str]:
    """Paths of the classifiers of a root."""
    lib = library(root)
    found = lib.heads(root) if lib else []
    if found:
        return found
    guesses = ("head", "classifier", "fc")
    return [g for g in guesses if isinstance(getattr(root, g, None), nn.Linear)][:1]


def example(root: nn.Module) -> tuple[Any, ...] | None:
    lib = library(root)
    return lib.example(root) if lib else None


def prefix_tokens(root: nn.Module) -> int | None:
    """How many tokens (class token, registers) stand before the patches, None if unknown."""
    lib = library(root)
    return lib.prefix_tokens(root) if lib else None


def _libraries() -> dict[str, Library]:
    from visionpeft.backbones import diffusers, open_clip, points, segmentation, timm, torch, transformers

    files = (timm, open_clip, transformers, diffusers, points, segmentation, torch)
    return {file.LIBRARY.name: file.LIBRARY for file in files}


LIBRARIES: dict[str, Library] = _libraries()
