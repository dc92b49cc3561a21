"""Part segmentation from data to run folder and back, on a few small clouds and a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from visionpeft import cli
from visionpeft.data import made_clouds
from visionpeft.data.cloud_files import read_cloud
from visionpeft.errors import DataError
from visionpeft.metrics.parts import shape_ious
from visionpeft.models.point_mae import create as pretraining_model
from visionpeft.pipelines import point_deploy, point_parts, point_pretraining, points
from visionpeft.pipelines.points import Config, Sweep, run, sweep

CLASSES = ("lamp", "table")
pytestmark = pytest.mark.usefixtures("tiny_point_mae")


@pytest.fixture
def clouds(tmp_path) -> str:
    rng = np.random.default_rng(0)
    arrays: dict = {"classes": np.array(CLASSES), "parts": np.array(["base", "rod", "shade", "top", "legs"])}
    for part, count in (("train", 6), ("test", 3)):
        made = [(3 * i, *made_clouds._make(name, rng, 48)) for i, name in enumerate(CLASSES) for _ in range(count)]
        arrays[f"{part}_points"] = np.stack([xyz for _, xyz, _ in made])
        arrays[f"{part}_part"] = np.stack([first + parts for first, _, parts in made])
        arrays[f"{part}_label"] = np.repeat(np.arange(2), count)
    np.savez(tmp_path / "clouds.npz", **arrays)
    return f"parts:{tmp_path / 'clouds.npz'}"


@pytest.fixture
def given(clouds, tmp_path) -> dict:
    torch.manual_seed(0)
    weights = tmp_path / "weights.safetensors"
    point_pretraining.write_encoder(pretraining_model(points.NANO), weights)
    return {"data": clouds, "checkpoint": str(weights), "points": 32, "out": str(tmp_path / "runs"), "epochs": 2,
            "batch_size": 4, "warmup_epochs": 0}  # fmt: skip


def test_a_sweep_over_methods_scores_by_shape(given, tmp_path):
    methods = ("raw", "scratch", "linear", "pointgst:rank=4,local=4", "dapt:hidden=4", "idpt", "ppt:tokens=4", "lora")
    outcome = sweep(Sweep(method=methods, **given))
    assert not outcome.failures and [r.method for r in outcome.results] == list(methods)
    for result in outcome.results:
        assert result.measure == "instance_mIoU" and result.test_images == 6 and result.classes == list(CLASSES)
        assert result.accuracy == result.metrics["test_instance_mIoU"] and set(result.per_class) == set(CLASSES)
        assert np.isclose(result.metrics["test_class_mIoU"], np.mean(list(result.per_class.values())))
        html = (Path(result.folder) / "report.html").read_text()
        assert html.count("<img") == 6 and "true part" in html
    assert outcome.results[3].adapter_parameters == 3 * (2 * 16 * 4 + 4 + 16 + 4 * 4 + 4 + 4 * 4)
    assert "mIoU of categories" in (tmp_path / "runs" / "report.html").read_text()


def test_the_score_is_that_of_the_likeliest_of_the_categorys_parts(given):
    config = Config(method="linear", **given)
    from visionpeft.training import make_accelerator

    cell = point_parts.Cell(config, point_parts.plan_for(config), make_accelerator())
    feed = points.plain_feed(config, "test")
    (batch, parts), = feed.batches([list(range(6))], 0, 0)
    assert batch[:, 0, 3].tolist() == [0, 0, 0, 1, 1, 1] and parts.shape == (6, 32)
    logits = cell.model.eval()(batch).detach()
    best = torch.stack([logits[i, (0, 1, 2) if i < 3 else (3, 4)].argmax(0) + (0 if i < 3 else 3) for i in range(6)])
    assert torch.equal(cell.predicted("test"), best) and not cell.model.training
    expected = shape_ious(best, parts, feed.targets, ((0, 1, 2), (3, 4))).mean().item()
    assert cell.score("test")["instance_mIoU"] == expected


def test_training_gives_points_with_their_own_parts(given):
    config = Config(method="linear", **given)
    from visionpeft.training import make_accelerator

    cell = point_parts.Cell(config, point_parts.plan_for(config), make_accelerator())
    feed = cell.train_feed("train_val")
    feed.augment = "none"
    (batch, parts), = feed.batches([[1, 7]], 0, 0)
    for row, own, i in zip(batch, parts, (1, 7), strict=True):
        known = {tuple(p[:3].tolist()): int(p[3]) for p in feed.clouds[i]}
        assert [known[tuple(p)] for p in row[:, :3].tolist()] == own.tolist()


def test_a_killed_run_goes_on_to_the_same_numbers(given, tmp_path):
    plain = run(Config(method="pointgst:rank=4,local=4", **given))
    config = Config(method="pointgst:rank=4,local=4", checkpoint_seconds=0.0, **(given | {"out": str(tmp_path / "b")}))

    def kill(done, steps, loss):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, kill)
    resumed = run(config)
    assert resumed.notes and resumed.metrics == plain.metrics


def test_predict_writes_a_part_for_every_point_of_a_file(given, tmp_path, capsys):
    result = run(Config(method="pointgst:rank=4,local=4", **given))
    with np.load(given["data"].partition(":")[2]) as file:
        tests = file["test_points"]
    for i, cloud in enumerate(tests):
        path = tmp_path / "clouds" / CLASSES[i // 3] / f"{i}.xyz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savetxt(path, 3 * cloud + 7)
    out = tmp_path / "parts"
    assert cli.main(["points", "predict", result.folder, str(tmp_path / "clouds"), "--out", str(out)]) == 0
    lines = (out / "parts.csv").read_text().splitlines()
    assert lines[0] == "number,part,category" and lines[4] == "3,top,table"
    config = Config(method="pointgst:rank=4,local=4", **given)
    sampled = points.plain_feed(config, "test").clouds
    deployed = point_deploy.restore(result.folder)
    with torch.no_grad():  # so that it does not say the same of all points
        for p in deployed.model.parameters():
            p.add_(torch.randn_like(p), alpha=0.5)
    assert point_deploy.write_parts(deployed, tmp_path / "clouds", out) == 6
    likeliest = point_parts.Likeliest(deployed.model, deployed.owned, 5)
    for i, cloud in enumerate(tests):
        rows = read_cloud(out / CLASSES[i // 3] / f"{i}.txt")
        assert rows.shape == (48, 4)
        np.testing.assert_allclose(rows[:, :3], 3 * cloud + 7, rtol=1e-6)
        seen = torch.nn.functional.pad(sampled[i : i + 1, :32, :3], (0, 1), value=i // 3)
        with torch.no_grad():
            said = likeliest(seen)[0].numpy()
        assert len(set(said.tolist())) > 1 or i != 1
        own = np.linalg.norm(cloud[:, None] - seen[0, :, :3].numpy()[None], axis=-1).argmin(1)
        assert (rows[:, 3] == said[own]).mean() > 0.97  # but where two are as near
    single = tmp_path / "clouds" / "table" / "3.xyz"
    np.save(single.with_suffix(".npy"), tests[3])
    with pytest.raises(DataError, match="3.npy and .*3.xyz would both be written to .*table/3.txt"):
        point_deploy.write_parts(deployed, tmp_path / "clouds", out)
    assert cli.main(["points", "predict", result.folder, str(single), "--out", str(out), "--category", "bed"]) == 2
    assert "'bed' is no category" in capsys.readouterr().err
    single.rename(tmp_path / "3.xyz")
    with pytest.raises(DataError, match="--category"):
        point_deploy.write_parts(deployed, tmp_path / "3.xyz", out)
    assert point_deploy.write_parts(deployed, tmp_path / "3.xyz", out, "table") == 1


def test_what_is_meant_for_classes_is_refused(given, tmp_path):
    with pytest.raises(point_parts.VotingError, match="--votes"):
        run(Config(method="linear", votes=2, **given))
    assert Config(data="shapenetpart:x").seen == 2048 and Config(data="shapenetpart:x", model="point_mae").job == (
        "point_parts")  # fmt: skip
    assert Config(data="shapenetpart:x", model="point_mae").backbone.groups == 128
    recipe = point_parts.plan_for(Config(data="shapenetpart:x", model="point_mae")).recipe
    assert (recipe.lr, recipe.epochs, recipe.batch_size, recipe.weight_decay) == (2e-4, 300, 16, 0.05)
