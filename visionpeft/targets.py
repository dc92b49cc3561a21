"""Which places and tensors somebody means: the words of `targets=` and of `train=`.

Targets are written as roles (`query value`), kinds (`linear`, `conv`, `norm`), path globs (`blocks.*.attn.proj`), any
mixture of these separated by spaces, or a predicate `(Site) -> bool`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from visionpeft.errors import SiteError
from visionpeft.sites import KINDS, ROLES, Backbone, Site, inside

APART = ("head", "projection")  # last layers, which a kind does not choose: they have to be named

Targets = str | Sequence[str] | Callable[[Site], bool] | None


def choose_among(sites: Sequence[Site], targets: Targets, within: str | None, exclude: str | None,
                 presets: Mapping[str, set[str]] | None = None) -> list[Site]:  # fmt: skip
    """The sites that targets choose, each once, in the order given.

    The classifier, and the projections of CLIP towers into their joint space, are chosen only by a glob that names
    them, by their role or by a predicate. A glob takes whole modules:
    rows of one are chosen by role. `presets` are words for sets of paths.

    Raises:
        SiteError: a word of `targets` or `exclude` matches nothing, with the words that would.
    """
    if exclude is not None and not any(_under(s, exclude) for s in sites):
        raise SiteError(f"exclude={exclude!r} matches no path: is it misspelt?")
    sites = [s for s in sites if _inside(s, within, exclude)]
    if callable(targets):
        hits = {"targets=<predicate>": [s for s in sites if targets(s)]}
    else:
        words = targets.split() if isinstance(targets, str) else list(targets or ())
        known = presets or {}
        hits = {
            word: [s for s in sites if (s.path in known[word] and not s.part if word in known else _matches(s, word))]
            for word in words
        }
    empty = [word for word, hit in hits.items() if not hit] or ([] if hits else [""])
    if empty:
        raise SiteError(_no_match(empty, sites))
    chosen = {id(s) for hit in hits.values() for s in hit}
    return [s for s in sites if id(s) in chosen]


def _inside(site: Site, within: str | None, exclude: str | None) -> bool:
    return (within is None or _under(site, within)) and (exclude is None or not _under(site, exclude))


def _under(site: Site, glob: str) -> bool:
    return fnmatchcase(site.path, glob) or fnmatchcase(site.full, glob)


def _matches(site: Site, word: str) -> bool:
    if word in ROLES:
        return site.role == word
    if word in KINDS:  # whole modules, or all parts where only parts exist (nn.MultiheadAttention)
        return site.kind == word and site.role not in APART and (not site.part or bool(site.host))
    if site.role == "projection":
        return fnmatchcase(site.full, word)
    return fnmatchcase(site.path, word) and (not site.part or bool(site.host) or site.kind == "tensor")


def _no_match(words: Sequence[str], sites: Sequence[Site]) -> str:
    roles = sorted({s.role for s in sites if s.role})
    paths = [s.path for s in sites][:: max(1, len(sites) // 5)][:5]
    return (
        f"no site matches {' '.join(words)!r} among {len(sites)} sites. Roles here: {' '.join(roles) or 'none'}; "
        f"paths look like {', '.join(paths) or 'nothing'}. visionpeft.inspect(model) lists them all"
    )


def trained_tensors(backbone: Backbone, train: str | Sequence[str] | None) -> list[tuple[str, str]]:
    """(path, name) of the parameters that `train=` means.

    Raises:
        SiteError: a glob matches no parameter, or the model has no classifier.
    """
    globs = train.split() if isinstance(train, str) else list(train or ())
    heads = backbone.heads()
    found: list[tuple[str, str]] = []
    tensors = [(path, name, f"{path}.{name}" if path else name) for path, _, name in backbone.named_tensors()]
    for glob in globs:
        if glob == "head":
            hits = [(p, n) for p, n, _ in tensors if inside(p, heads)]
            hits += [(p, n) for p, n in statistics(backbone) if inside(p, heads)]
            why = "the model has no classifier: create it with num_classes, or name the parameters"
        else:
            hits = [(p, n) for p, n, full in tensors if fnmatchcase(full, glob) or fnmatchcase(full, glob + ".*")]
            why = f"no parameter matches; names look like {', '.join(full for *_, full in tensors[-3:])}"
        if not hits:
            raise SiteError(f"train={glob!r}: {why}")
        found += [key for key in hits if key not in found]
    return found


def statistics(backbone: Backbone) -> list[tuple[str, str]]:
    """(path, name) of the running statistics of all BatchNorms."""
    norms = (
        (path, name)
        for path, module, name in backbone.named_tensors(buffers=True)
        if name in module._buffers and isinstance(module, nn.modules.batchnorm._BatchNorm)
    )
    return list(norms)
