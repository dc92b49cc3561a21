"""A cell end to end: what it writes, what it refuses, what it measures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import visionpeft as vp
from visionpeft.methods import spt
from visionpeft.pipelines import cell as cell_module
from visionpeft.pipelines.cell import Cell, load_splits
from visionpeft.pipelines.classification import Config, run
from visionpeft.pipelines.methods import MethodError
from visionpeft.pipelines.recipes import plan_for
from visionpeft.training import TensorFeed, make_accelerator, runs
from visionpeft.training.recipe import RecipeError


def test_a_run_folder_is_complete(config: Config) -> None:
    result = run(config)
    assert {p.name for p in config.folder.iterdir()} == {
        "config.json", "adapter.safetensors", "metrics.jsonl", "result.json", "report.html"}
    assert 0 <= result.accuracy <= 1 and result.test_images == 50
    assert result.file_bytes == (config.folder / "adapter.safetensors").stat().st_size
    assert result.seconds_per_step > 0
    assert len((config.folder / "metrics.jsonl").read_text().splitlines()) == 2
    page = (config.folder / "report.html").read_text()
    assert "<svg" in page and "data:image/png" in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?https?:|url\(https?:""", page), "something would be fetched"


def test_counts_leave_out_the_head(config: Config, make: Any) -> None:
    """LoRA of rank 2 on query and value of six blocks of width 64; the head is 64 x 10 + 10."""
    result = run(make(method="lora:rank=2,targets=query value"))
    assert result.adapter_parameters == 6 * 2 * 2 * (64 + 64)
    assert result.trained_parameters == result.adapter_parameters + 650


def test_a_finished_cell_is_not_run_again(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(config)
    monkeypatch.setattr(cell_module, "fit", None)
    assert run(config) == first


def test_other_settings_in_the_same_folder_are_refused(config: Config, make: Any) -> None:
    run(config)
    with pytest.raises(runs.RunError, match="epochs is 2 there and 3 here"):
        run(make(epochs=3))


def test_the_adapter_file_gives_the_same_model(config: Config) -> None:
    run(config)
    splits = load_splits(config)
    cell = Cell(config, plan_for(config), make_accelerator())
    cell.tuner.detach()
    vp.load(cell.model, config.folder / "adapter.safetensors")
    accuracy = float((cell.logits("test").argmax(1).numpy() == splits.test.labels).mean())
    assert accuracy == pytest.approx(json.loads((config.folder / "result.json").read_text())["accuracy"])


def test_spt_spends_its_budget_and_goes_through_a_file(make: Any) -> None:
    """On train alone, first batches first; the file comes back and scores the same."""
    config = make(method="spt:budget=30000,method=lora", epochs=1)
    result = run(config)
    cell = Cell(config, plan_for(config), make_accelerator())
    images = cell.feed("train")
    batches = [(images.inputs[i:i + 16], images.targets[i:i + 16]) for i in range(0, 48, 16)]  # type: ignore[attr-defined]
    cell.tuner.detach()
    plan = spt.allocate(cell.model, spt.sensitivity(cell.model, batches), vp.LoRA(), budget=30000)
    tuner = vp.load(cell.model, config.folder / "adapter.safetensors")
    assert list(tuner.method.structured) == list(plan.structured) and plan.structured
    assert set(tuner.method.sparse) == set(plan.sparse) and list(tuner.method.vectors) == list(plan.vectors)
    assert result.adapter_parameters == tuner.num_parameters
    assert float((cell.logits("test").argmax(1).numpy() == cell.splits.test.labels).mean()) == result.accuracy


def test_mosa_trains_with_its_own_term(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, fit = [], cell_module.fit

    def watched(*args: Any, **options: Any) -> Any:
        asked.append(options["consistency"])
        return fit(*args, **options)

    monkeypatch.setattr(cell_module, "fit", watched)
    for method in ("mosa:hidden=4", "mosa:hidden=4,consistency=0.5", "lora:rank=2"):
        run(make(method=method, epochs=1))
    assert asked == [1.0, 0.5, 0.0]


def test_mosas_term_is_not_for_multi_label_data(make: Any) -> None:
    cell = Cell(make(method="mosa:hidden=4"), plan_for(make(method="mosa")), make_accelerator())
    cell.splits = SimpleNamespace(multi_label=True)  # type: ignore[assignment]
    with pytest.raises(RecipeError, match="mosa:consistency=0"):
        cell._consistency()


def test_the_same_seed_gives_the_same_bits(config: Config, make: Any) -> None:
    first, second = run(make(out=config.out + "/a")), run(make(out=config.out + "/b"))
    assert first.metrics == second.metrics
    a, b = (load_file(Path(r.folder) / "adapter.safetensors") for r in (first, second))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert run(make(seed=1)).metrics != first.metrics


@pytest.mark.parametrize("method", ["raw", "scratch", "linear", "ssf", "full", "bitfit"])
def test_every_row_runs(make: Any, method: str) -> None:
    result = run(make(method=method))
    assert 0 <= result.accuracy <= 1
    assert (result.adapter_parameters is None) == (method == "raw")


def test_scratch_starts_at_random(make: Any) -> None:
    config = make(method="scratch")
    state = Cell(config, plan_for(config), make_accelerator()).model.state_dict()
    stored = load_file(config.checkpoint)
    assert not torch.equal(state["blocks.0.attn.qkv.weight"], stored["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cached_features_change_nothing(make: Any, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    cached = run(make(method="linear", out=make().out + "/cached", precision=precision))
    assert any("computed once" in note for note in cached.notes)
    monkeypatch.setattr(Cell, "_cacheable_head", lambda self: None)
    plain = run(make(method="linear", out=make().out + "/plain", precision=precision))
    assert plain.notes == []
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    assert cached.metrics["train_loss"] == pytest.approx(plain.metrics["train_loss"], rel=tolerance)
    a, b = (load_file(Path(r.folder) / "adapter.safetensors") for r in (cached, plain))
    assert all(torch.allclose(a[key], b[key], atol=tolerance) for key in a)


@pytest.mark.parametrize("changes", [{"augment": "flip"}, {"drop_path": 0.5}, {"mixup": 0.5}, {"method": "bitfit"}])
def test_features_are_not_cached_where_they_vary(make: Any, changes: dict[str, Any]) -> None:
    config = make(**({"method": "linear"} | changes))
    assert Cell(config, plan_for(config), make_accelerator()).trained is not None
    cell = Cell(config, plan_for(config), make_accelerator())
    assert cell.trained is cell.model and cell.notes == []


def test_a_grid_selects_on_val_and_trains_again(make: Any) -> None:
    config = make(method="linear", grid=("lr=1e-9,1e-1",), epochs=4)
    result = run(config)
    scores = {row["lr"]: row["val_accuracy"] for row in result.selection}
    assert set(scores) == {1e-9, 1e-1} and scores[1e-1] > scores[1e-9]
    assert result.recipe["lr"] == 1e-1
    assert {p.name for p in (config.folder / "grid").iterdir()} == {"lr=1e-09", "lr=0.1"}


def test_a_grid_searches_fields_of_the_method(make: Any) -> None:
    """What does best on val is trained and written; values that cannot be are refused before any work."""
    result = run(make(method="lora:targets=query value", grid=("rank=1,3", "lr=1e-9,1e-2"), epochs=4))
    best = max(result.selection, key=lambda row: row["val_accuracy"])
    assert best["lr"] == 1e-2 and [(row["rank"], row["lr"]) for row in result.selection] == [
        (1, 1e-9), (1, 1e-2), (3, 1e-9), (3, 1e-2)]
    assert result.adapter_parameters == 6 * 2 * best["rank"] * (64 + 64)
    assert f"rank={best['rank']}" in result.recipe["method"]
    with pytest.raises(MethodError, match="rank=0"):
        run(make(method="lora", grid=("rank=4,0",)))


def test_selection_never_reads_the_test_set(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    feed = Cell.feed
    monkeypatch.setattr(Cell, "feed", lambda self, part: used.append(part) or feed(self, part))
    run(make(grid=("lr=1e-3,1e-2",)))
    first_test = used.index("test")
    assert set(used[:first_test]) == {"train", "val", "train_val"} and set(used[first_test:]) == {"test"}


def test_best_test_epoch_is_apart(make: Any) -> None:
    result = run(make(track_test=1, epochs=3))
    rows = [json.loads(line) for line in (Path(result.folder) / "metrics.jsonl").read_text().splitlines()]
    assert result.metrics["best_test_epoch_accuracy"] == max(row["test_accuracy"] for row in rows)
    assert result.accuracy == rows[-1]["test_accuracy"]
    assert "best_test_epoch_accuracy" not in run(make(seed=1)).metrics


def test_multi_label_data(make: Any, tmp_path: Path) -> None:
    from PIL import Image

    lines = ["path,label"]
    for index in range(40):
        Image.new("RGB", (32, 32), (6 * index, 255 - 6 * index, 90)).save(tmp_path / f"{index}.png")
        lines.append(f"{index}.png,{'dark' if index < 20 else 'bright'}{';odd' if index % 2 else ''}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    config = make(data=f"csv:{tmp_path / 'labels.csv'}", class_weights=True)
    assert load_splits(config).multi_label
    result = run(config)
    assert 0.3 < result.accuracy <= 1 and result.confusion is None


def test_vtab_takes_the_published_recipe(make: Any) -> None:
    plan = plan_for(Config(data="vtab:cifar", method="ssf"))
    assert (plan.recipe.lr, plan.recipe.weight_decay, plan.recipe.drop_path) == (5e-3, 5e-5, 0)
    assert (plan.recipe.epochs, plan.recipe.batch_size, plan.recipe.drop_last) == (100, 64, True)
    assert plan.protocol == "vtab-half" and not plan.recipe.decay_1d
    lora = plan_for(Config(data="vtab:cifar?train=100", method="lora:rank=2", lr=0.5))
    assert lora.fields["rank"] == 8 and lora.recipe.lr == 0.5 and lora.protocol == "vtab-imagenet"


def test_data_are_named_without_their_folders() -> None:
    names = {spec: Config(data=spec).data_name for spec in ("folder:/a/b/", "folder:b", "npz:/a/c.npz?train=9&test=3")}
    assert list(names.values()) == ["folder:b", "folder:b", "npz:c.npz?train=9&test=3"]


def test_warm_up_keeps_its_share() -> None:
    assert plan_for(Config(data="vtab:dtd", epochs=20)).recipe.warmup_epochs == 2
    assert plan_for(Config(data="digits", epochs=1)).recipe.warmup_epochs == 0
    assert plan_for(Config(data="digits", epochs=6)).recipe.warmup_epochs == 1  # 0.6, and not none at all


def test_images_are_decoded_once_for_all_cells(make: Any) -> None:
    cells = [Cell(config, plan_for(config), make_accelerator()) for config in (make(), make(method="ssf", seed=3))]
    feeds = [cell.feed("train") for cell in cells]
    assert isinstance(feeds[0], TensorFeed) and feeds[0] is feeds[1]
