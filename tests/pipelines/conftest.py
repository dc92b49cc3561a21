"""A model and data small enough that a whole run takes a second or two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from visionpeft.pipelines.classification import Config


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights of timm's test_vit, as a file."""
    timm = pytest.importorskip("timm")
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    save_file(timm.create_model("test_vit", img_size=32).state_dict(), path)
    return str(path)


@pytest.fixture
def tiny_point_mae(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The nano Point-MAE made smaller still, three blocks of width 16; afterwards no clouds are held."""
    from visionpeft.models import point_transformer
    from visionpeft.pipelines import points

    small = point_transformer.Architecture(8, 6, 16, 3, 2, 16, (4, 8), 0.0, "bn", 8)
    monkeypatch.setitem(point_transformer.ARCHITECTURES, points.NANO, small)
    yield
    points._splits.cache_clear()
    points._ordered.cache_clear()


@pytest.fixture
def config(checkpoint: str, tmp_path: Path) -> Config:
    """A cell on scikit-learn's digits."""
    return Config(model="test_vit", checkpoint=checkpoint, img_size=32, data="digits?train=60&test=50",
                  out=str(tmp_path / "runs"), method="lora:rank=2", epochs=2, batch_size=16)


@pytest.fixture
def make(config: Config) -> Any:
    """The cell with some settings changed."""
    return lambda **changes: replace(config, **changes)
