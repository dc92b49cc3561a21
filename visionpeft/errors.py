"""The few errors of the library. Each message says what, where and how to mend it."""

from __future__ import annotations

import importlib
from types import ModuleType


class VisionPEFTError(Exception):
    """Root of all errors that this library raises on purpose."""


class DeadAdapterError(VisionPEFTError):
    """An adapter never acts: the model does not call its site, or reads around it."""


class SiteError(VisionPEFTError):
    """Targets match no site, or a method cannot act at a site."""


class MethodError(VisionPEFTError, ValueError):
    """A method's hyper-parameters make no sense."""


class MergeError(VisionPEFTError):
    """A method cannot merge, or the weight changed since it was merged."""


class AdapterFileError(VisionPEFTError):
    """An adapter file is truncated, foreign, or made for another model."""


class FormatError(VisionPEFTError):
    """What an adapter is cannot be said in another tool's format, or a file of that tool cannot be read here."""


class DataError(VisionPEFTError):
    """Data on disk are missing, malformed or inconsistent."""


class MissingExtra(VisionPEFTError, ImportError):
    """An optional dependency is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra brings it.

    Raises:
        MissingExtra: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtra(f"{module} is not installed: pip install 'visionpeft[{extra}]'") from error
