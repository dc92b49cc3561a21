"""One file per adapter: tensors in safetensors, everything else as JSON in its header.

    header["visionpeft"] = {format, method, fields, sites: [{path, part, kind, shape, tensors: {name: key}}],
                            tensors: [{path, name, key, train}], scale, backbone: {library, class, fingerprint, shapes},
                            versions, metadata}

Nothing is unpickled, keys are looked up and never parsed, and writing is atomic.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from visionpeft import attaching, backbones, binding, levers
from visionpeft.adapter import Adapter
from visionpeft.errors import AdapterFileError
from visionpeft.methods import ALLOCATED, METHODS
from visionpeft.reversible import BITS
from visionpeft.sites import Backbone, Site, inside
from visionpeft.tuner import Tuner

FORMAT = 1


def save(tuner: Tuner, path: str | Path, metadata: dict[str, Any]) -> None:
    """Write the adapter and its `train=` tensors to one file.

    Raises:
        AdapterFileError: metadata is no JSON, or the file cannot be written; an old file is still whole.
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[int, str] = {}  # tensors shared by several sites are written once
    alive: list[Tensor] = []  # so that no other has their id

    def enter(key: str, value: Tensor) -> str:
        if id(value) not in seen:
            seen[id(value)] = key
            alive.append(value)
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value  # sharded by FSDP2
            tensors[key] = whole.detach().contiguous()
        return seen[id(value)]

    if any(value.is_meta for value in tuner.state_dict().values()):
        raise AdapterFileError(f"{path}: nothing to save: the tensors of {tuner.name!r} are on the meta device")
    own = {(site.path, site.part) for site in tuner.sites if site.kind == "tensor"}
    components = _components(tuner)
    header = {
        "format": FORMAT,
        "method": tuner.method.key,
        "fields": tuner.method.hyper_parameters(),
        "scale": tuner.scale,
        **({"memory": "reversible", "bits": BITS} if tuner.memory == "reversible" else {}),  # it is part of the model
        "sites": [_site_entry(site, adapter, enter) for site, adapter in tuner.adapters.items()],
        "tensors": [
            {
                "path": p,
                "name": n,
                "train": (p, n) in tuner.trained,
                "site": (p, n) in own,
                "key": enter(f"{p}.{n}".lstrip("."), value),
            }
            for (p, n), value in ((key, tuner.learnt(*key)) for key in tuner.in_place)
        ],
        "backbone": describe(tuner.backbone, components),
        "components": components,
        "versions": _versions(tuner.backbone),
        "metadata": metadata,
    }
    try:
        text = json.dumps(header)
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"{path}: metadata must be JSON: {error}") from error
    _write(Path(path), safetensors.torch.save(tensors, {"visionpeft": text}))


def _site_entry(site: Site, adapter: Adapter, enter: Any) -> dict[str, Any]:
    names = {name: enter(f"{site}.{name}", value) for name, value in adapter.file_tensors().items()}
    return {"path": site.path, "part": site.part, "kind": site.kind, "shape": list(site.shape), "tensors": names}


def _write(path: Path, data: bytes) -> None:
    """All or nothing: a temporary file beside the target, flushed to disk, then renamed over it."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".part", delete=False) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # as open() would have made it
        os.replace(temporary, path)
    except OSError as error:
        kept = "; the old file is untouched" if path.exists() else ""
        raise AdapterFileError(f"{path}: cannot write: {error.strerror or error}{kept}") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def _components(tuner: Tuner) -> list[str]:
    """Components of the model that the adapter touches; [""] if there is but one module."""
    paths = [site.path for site in tuner.sites] + [path for path, _ in tuner.in_place]
    found = {tuner.backbone.split(path)[0] for path in paths}
    return [name for name in tuner.backbone.roots if name in found] or list(tuner.backbone.roots)


def describe(backbone: Backbone, components: Sequence[str] | None = None,
             known: Sequence[Site] | None = None) -> dict[str, Any]:  # fmt: skip
    """Library, class and the shapes of all sites outside the classifier, which may differ in size.

    Of some components only if they are named; one component is described as if it were the whole. `known` are the
    backbone's sites, which take as long to find as an adapter to load.
    """
    chosen = {name: root for name, root in backbone.roots.items() if components is None or name in components}
    roots = dict(sorted((chosen or backbone.roots).items()))  # in whatever order the model has them
    every = backbone.sites() if known is None else known
    sites = [s for s in every if s.role != "head" and backbone.split(s.path)[0] in roots]
    sites.sort(key=lambda s: backbone.split(s.path)[0])
    skipped = len(next(iter(roots))) + 1 if set(roots) != {""} and len(roots) == 1 else 0
    text = "\n".join(f"{str(s)[skipped:]} {s.kind} {s.shape}" for s in sites)
    lib = backbones.library(next(iter(roots.values())))
    return {
        "library": lib.name if lib else "",
        "class": ", ".join(type(r).__name__ for r in roots.values()),
        "fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16],
        "shapes": dict(Counter(f"{s.kind} {'x'.join(map(str, s.shape))}" for s in sites)),
    }


def _versions(backbone: Backbone) -> dict[str, str]:
    names = {"visionpeft", "torch", *(lib.name for r in backbone.roots.values() if (lib := backbones.library(r)))}
    names = {"open_clip_torch" if n == "open_clip" else n for n in names}
    found = {}
    for name in sorted(names):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_header(path: str | Path) -> dict[str, Any]:
    """What an adapter file says of itself; no tensor is read.

    Raises:
        AdapterFileError: the file is missing, truncated, no safetensors, or not ours.
    """
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            text = (file.metadata() or {}).get("visionpeft")
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterFileError(f"{path}: no readable safetensors file ({error})") from error
    if text is None:
        raise AdapterFileError(f"{path}: a safetensors file, but not one that visionpeft wrote")
    try:
        header = dict(json.loads(text))
        version = header.get("format", FORMAT)
        if not isinstance(version, int):
            raise TypeError(f"format {version!r} is no number")
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"{path}: the header is damaged: {error}") from error
    missing = {"format", "method", "fields", "sites", "tensors", "backbone", "scale"} - set(header)
    if missing:
        raise AdapterFileError(f"{path}: the header lacks {', '.join(sorted(missing))}")
    if version > FORMAT:
        raise AdapterFileError(f"{path}: format {version} is newer than {FORMAT}, the last known here: upgrade")
    return header


@torch.inference_mode(False)
def load(model: Any, path: str | Path, name: str | None = None, *, memory: str = "rebuild",
         probe: bool = True) -> Tuner:  # fmt: skip
    """Attach the adapter in a file and fill it; it acts at once, and brings its own classifier if it has one.

    A file of a component alone (a UNet) loads into the pipeline, and one of a pipeline's component into that.

    Args:
        name: what to call it in the model; the file's stem by default.
        memory: what to keep for backward, see `visionpeft.levers`; a file of a reversible model says so itself.
        probe: whether to look for dead adapters at once.

    Raises:
        AdapterFileError: a damaged or foreign file, or one for another model, with the first differing sites.
        VisionPEFTError: as `attach`.
    """
    levers.check(memory)
    header = read_header(path)
    backbone = Backbone(model)
    name = name or Path(path).stem.replace(".", "_")
    attaching.check_name(backbone, name)
    tensors = _tensors(path)
    try:
        header = _placed(header, backbone)
        tuner, built, values, trained, scale = _interpret(header, tensors, backbone, name, path, memory)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise AdapterFileError(f"{path}: the header is damaged: {type(error).__name__}: {error}") from error
    attaching.bind(tuner, built, values, trained, probe=probe, values=values)
    if scale != 1:
        tuner.scale = scale
    return tuner


def _memory(header: dict[str, Any], wanted: str, path: str | Path) -> str:
    """What the file was trained with where that is part of the model, else what is wanted."""
    if "memory" not in header and wanted != "reversible":
        return wanted
    if (header.get("memory"), header.get("bits")) == ("reversible", BITS):
        return "reversible"
    if "memory" in header:
        raise AdapterFileError(f"{path}: trained with memory={header['memory']!r}, which this version does not know")
    raise AdapterFileError(f"{path}: trained without memory='reversible', which would change what it computes")


def _placed(header: dict[str, Any], backbone: Backbone) -> dict[str, Any]:
    """The header with its paths below the component here that has the fingerprint of the one it was made for."""
    (old, *more) = header.get("components", [""])
    if more or old in backbone.roots:
        return header
    wanted = header["backbone"].get("fingerprint")
    found = [name for name in backbone.roots if describe(backbone, [name])["fingerprint"] == wanted]
    if len(found) != 1:
        return header

    def moved(path: str) -> str:
        return ".".join(p for p in (found[0], path[len(old) :].lstrip(".") if old else path) if p)

    entries = {key: [e | {"path": moved(e["path"])} for e in header[key]] for key in ("sites", "tensors")}
    fields_ = dict(header["fields"])
    if fields_.get("ranks"):
        fields_["ranks"] = {moved(p): r for p, r in fields_["ranks"].items()}
    return header | entries | {"fields": fields_, "components": found}


def _tensors(path: str | Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(str(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterFileError(f"{path}: no readable safetensors file ({error})") from error


Interpreted = tuple[Tuner, dict[Site, Adapter], dict[tuple[str, str], Tensor], list[tuple[str, str]], float]


def _interpret(
    header: dict[str, Any], tensors: dict[str, Tensor], backbone: Backbone, name: str, path: str | Path, memory: str
) -> Interpreted:
    """Filled adapters and the model's own tensors that a file describes; nothing is attached yet."""
    method = _method(header, path)
    sites = _sites(header, backbone, path)
    attaching.check_sites(method, sites, backbone)
    built = method.adapters(sites, backbone) if sites else {}
    _fill(built, header, tensors, path)
    entries = {(e["path"], e["name"]): e for e in header["tensors"]}
    values = {key: tensors[e["key"]] for key, e in entries.items()}
    _check_tensors(values, backbone, path)
    sites = sites + [Site(*key, "", "tensor", tuple(values[key].shape)) for key, e in entries.items() if e["site"]]
    trained = [key for key, e in entries.items() if e["train"]]
    tuner = Tuner(backbone, method, name, sites, _memory(header, memory, path))
    return tuner, built, values, trained, float(header["scale"])


def _method(header: dict[str, Any], path: str | Path) -> Any:
    cls = {**METHODS, **ALLOCATED}.get(header["method"])
    if cls is None:
        raise AdapterFileError(f"{path}: method {header['method']!r} is not known here; known: {', '.join(METHODS)}")
    unknown = set(header["fields"]) - {f.name for f in fields(cls)}
    if unknown:
        raise AdapterFileError(f"{path}: {header['method']} has no field {', '.join(sorted(unknown))} in this version")
    return cls(**header["fields"])


def _sites(header: dict[str, Any], backbone: Backbone, path: str | Path) -> list[Site]:
    """The file's sites in this model; names the first that differ."""
    every = backbone.sites()
    here = {(s.path, s.part, s.kind): s for s in every}
    found, wrong = [], []
    for entry in header["sites"]:
        site = here.get((entry["path"], entry["part"], entry["kind"]))
        if entry["kind"] == "shared" or (site is None and not entry["tensors"]):
            continue  # made by the method for its sites
        label = entry["path"] + (f":{entry['part']}" if entry["part"] else "")
        shape = "x".join(map(str, entry["shape"]))
        if site is None:
            wrong.append(f"{label} [{entry['kind']} {shape}] is not here")
        elif list(site.shape) != entry["shape"]:
            wrong.append(f"{label} is {shape} in the file and {'x'.join(map(str, site.shape))} here")
        else:
            found.append(site)
    there, now = header["backbone"], describe(backbone, header.get("components"), every)
    if not wrong and there.get("fingerprint") != now["fingerprint"]:
        a, b = Counter(there.get("shapes", {})), Counter(now["shapes"])
        wrong = [f"{a[k]} sites of {k} in the file's model and {b[k]} here" for k in {**a, **b} if a[k] != b[k]]
        wrong = wrong or ["the same shapes under other paths"]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise AdapterFileError(
            f"{path}: made for another model, a {there.get('class')} of {there.get('library') or 'no known library'}: "
            + "; ".join(wrong[:3]) + more
        )  # fmt: skip
    return found


def _check_tensors(values: dict[tuple[str, str], Tensor], backbone: Backbone, path: str | Path) -> None:
    """The tensors that a file brings must be those of this model, but for the number of classes of a head."""
    have = {(p, n): binding.original(module, n) for p, module, n in backbone.named_tensors(buffers=True)}
    gone = [f"{p}.{n}" for p, n in values if (p, n) not in have]
    if gone:
        raise AdapterFileError(f"{path}: the model has no {', '.join(gone[:3])}, which the adapter has a copy of")
    heads = backbone.heads()
    for (where, name), value in values.items():
        first = 1 if inside(where, heads) else 0
        own = have[where, name]
        if own is not None and value.shape[first:] != own.shape[first:]:
            raise AdapterFileError(f"{path}: {where}.{name} is {_size(value)} in the file and {_size(own)} here")


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


@torch.no_grad()
def _fill(built: dict[Site, Any], header: dict[str, Any], tensors: dict[str, Tensor], path: str | Path) -> None:
    for (site, adapter), entry in zip(built.items(), header["sites"], strict=True):
        own = adapter.file_tensors()
        if set(own) != set(entry["tensors"]):
            raise AdapterFileError(f"{path}: {site} has {sorted(entry['tensors'])}, expected {sorted(own)}")
        for name, value in own.items():
            source = tensors.get(entry["tensors"][name])
            if source is None or source.shape != value.shape:
                got = "nothing" if source is None else tuple(source.shape)
                raise AdapterFileError(f"{path}: {site}.{name} is {got}, expected {tuple(value.shape)}")
        if not any(value.is_meta for value in own.values()):
            try:
                adapter.fill({name: tensors[key] for name, key in entry["tensors"].items()})
            except AdapterFileError as error:
                raise AdapterFileError(f"{path}: {site}: {error}") from None
