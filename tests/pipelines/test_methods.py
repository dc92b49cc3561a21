"""Methods and grids as text."""

from __future__ import annotations

import dataclasses

import pytest

import visionpeft as vp
from visionpeft.pipelines.methods import Budget, MethodError, method_name, parse_job_method, parse_method
from visionpeft.pipelines.selection import RECIPE, GridError, grid_of, grid_points


def test_settings_are_read() -> None:
    assert parse_method("lora:rank=3, targets=query value,dropout=0.1") == vp.LoRA(
        rank=3, targets="query value", dropout=0.1)
    assert parse_method("ssf") == vp.SSF()
    assert method_name("lora:rank=3") == "lora"


def test_commas_in_brackets_are_kept() -> None:
    assert parse_method("noah:lora=(1,0),adapter=0,prompts=(2,3)") == vp.methods.NOAH(
        lora=(1, 0), adapter=0, prompts=(2, 3))


def test_a_budget() -> None:
    assert parse_job_method("spt:budget=400000,method=lora") == Budget(400_000, "lora")
    assert parse_job_method("spt:budget=9") == Budget(9)
    assert parse_job_method("lora:rank=3", {"rank": 8}) == vp.LoRA(rank=3)


@pytest.mark.parametrize("text, what", [("spt", "needs the number"), ("spt:budget=x", "needs the number"),
                                        ("spt:budget=9,method=lorra", "unknown method 'lorra'"),
                                        ("spt:budget=9,rank=3", "budget, method")])
def test_what_no_budget_is(text: str, what: str) -> None:
    with pytest.raises(MethodError, match=what):
        parse_job_method(text)


def test_the_user_overrides_the_preset() -> None:
    assert parse_method("lora:rank=3", {"rank": 8, "dropout": 0.1}) == vp.LoRA(rank=3, dropout=0.1)


@pytest.mark.parametrize("text, what", [("lorra", "lora"), ("lora:rnak=3", "rank"), ("lora:rank", "field=value")])
def test_mistakes_are_named(text: str, what: str) -> None:
    with pytest.raises(MethodError, match=what):
        parse_method(text)


def test_a_grid_is_all_combinations() -> None:
    assert grid_points(("lr=1e-3,3e-3", "augment=flip,none"), "linear") == [
        {"lr": 1e-3, "augment": "flip"}, {"lr": 1e-3, "augment": None},
        {"lr": 3e-3, "augment": "flip"}, {"lr": 3e-3, "augment": None}]
    assert grid_points((), "linear") == [{}]
    assert grid_points(("scale=1,10", "clip=1"), "convpass:hidden=4") == [
        {"scale": 1, "clip": 1}, {"scale": 10, "clip": 1}]


def test_a_sweep_gives_each_method_its_part_of_the_grid() -> None:
    """A field that a method lacks, or that its text fixes, is not searched for it."""
    methods, grid = ("raw", "linear", "convpass", "convpass:scale=2", "spt:budget=9"), ("lr=1e-3,1e-2", "scale=0.1,1")
    assert [grid_of(grid, method, methods) for method in methods] == [
        ("lr=1e-3,1e-2",), ("lr=1e-3,1e-2",), grid, ("lr=1e-3,1e-2",), ("lr=1e-3,1e-2",)]
    with pytest.raises(GridError, match="neither training nor linear nor convpass:scale=2 has"):
        grid_of(grid, "linear", ("linear", "convpass:scale=2"))


def test_no_field_means_two_things_in_a_grid() -> None:
    for key, cls in vp.METHODS.items():
        assert not set(RECIPE) & {f.name for f in dataclasses.fields(cls)}, key


@pytest.mark.parametrize("entry", ["lr", "lr=", "rate=1", "scale=1"])
def test_a_malformed_grid_is_named(entry: str) -> None:
    with pytest.raises(GridError, match="lr"):
        grid_points((entry,), "lora")
