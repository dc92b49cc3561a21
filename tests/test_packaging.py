"""What is installed, what importing costs, which names the project may not carry."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = ("timm", "open_clip", "diffusers", "transformers", "torchvision", "PIL", "accelerate", "tyro", "rich",
         "matplotlib", "sklearn", "torchmetrics", "peft", "scipy", "segmentation_models_pytorch")


def test_every_package_is_listed() -> None:
    """With a package-dir mapping setuptools finds nothing by itself."""
    inside = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "visionpeft").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == inside | {"visionpeft.pipelines", "visionpeft.assets"}


def test_every_folder_of_modules_is_a_package() -> None:
    bare = {p.parent for p in (ROOT / "visionpeft").rglob("*.py") if not (p.parent / "__init__.py").exists()}
    assert not bare


def test_assets_are_package_data() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["visionpeft.assets"]
    files = [p for p in (ROOT / "assets").iterdir() if p.is_file() and p.suffix != ".py"]
    assert files and [p.name for p in files if not any(p.match(pattern) for pattern in patterns)] == []


def test_import_is_light() -> None:
    program = f"import sys, visionpeft; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_methods_and_errors_need_no_extra() -> None:
    """attach on a plain module works with torch alone."""
    program = (f"import sys\nfor name in {HEAVY!r}: sys.modules[name] = None\n"
               "import torch, visionpeft as vp\n"
               "model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))\n"
               "print(vp.attach(model, vp.LoRA(rank=1, targets='*'), train=None).num_parameters)")
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == str(4 + 4 + 4 + 2)


def test_a_missing_extra_is_named() -> None:
    program = ("import sys\nsys.modules['tyro'] = None\n"
               "from visionpeft.cli import main\nsys.exit(main(['inspect', 'x']))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "visionpeft: tyro is not installed: pip install 'visionpeft[train]'"


def test_nothing_has_an_upper_bound() -> None:
    project = PROJECT["project"]
    everything = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    assert not [r for r in everything if re.search(r"<|==|~=|!=", r.partition(";")[0])]


def test_all_is_every_extra_but_xformers() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    named = set(re.search(r"\[(.*)\]", extras["all"][0])[1].split(","))  # type: ignore[index]
    assert named == set(extras) - {"all", "xformers", "test", "dev"}


def test_pipelines_are_imported_by_their_installed_name() -> None:
    """`import pipelines` would be a second module beside visionpeft.pipelines."""
    wrong = [p for p in ROOT.rglob("*.py") if ".venv" not in p.parts and "build" not in p.parts
             and re.search(r"^\s*(from|import) (pipelines|assets)\b", p.read_text(), re.MULTILINE)]
    assert wrong == []
