"""An adapter that cannot act is an error, and looking for one changes nothing."""

from __future__ import annotations

import pytest
import torch
from small import Detaches, Net, ReadsAround, ReadsAroundInEval, ReadsAroundInTrain, image, vit
from torch import nn
from traces import assert_same, snapshot

import visionpeft as vp


@pytest.mark.parametrize(
    ("kind", "path", "modes"),
    [(ReadsAround, "fc2", "train and eval"), (ReadsAroundInEval, "fc2", "eval"), (ReadsAroundInTrain, "fc2", "train")],
)
def test_reading_around_is_found_in_each_mode(kind, path, modes):
    model = kind()
    tuner = vp.attach(model, vp.LoRA(rank=1, targets="linear"), train="head")
    with pytest.raises(vp.DeadAdapterError, match=rf"1 of 2 adapters of 'default'.*{path} \(in {modes}\)"):
        tuner.probe(torch.randn(2, 8))


def test_an_adapter_whose_output_is_cut_from_the_graph_is_dead():
    tuner = vp.attach(Detaches(), vp.LoRA(rank=1, targets="linear"), train="head")
    with pytest.raises(vp.DeadAdapterError, match=r"fc1 \(in train\)"):
        tuner.probe(torch.randn(2, 8))


def test_a_living_model_passes():
    vp.attach(Net(), vp.LoRA(rank=1, targets="linear"), train="head").probe(torch.randn(2, 8))


def test_an_adapter_that_is_never_called_is_dead():
    model = Net()
    model.spare = nn.Linear(8, 8)
    tuner = vp.attach(model, vp.SSF(targets="linear"), train="head")
    with pytest.raises(vp.DeadAdapterError, match="spare"):
        tuner.probe(torch.randn(2, 8))


class Awkward(Net):
    """Draws, updates a buffer, replaces another, and falls into a bad state if it is not left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(16)
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("last", torch.zeros(2, 8))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        self.count += 1
        self.last = x.detach()
        return self.head(self.fc2(self.drop(self.bn(self.fc1(x + torch.rand_like(x))))))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_probe_restores_modes_buffers_gradients_and_generator(training, fails):
    model = Awkward().train(training)
    model.fc1.train(not training)
    tuner = vp.attach(model, vp.LoRA(rank=1, targets="linear"), train="head")
    if fails:
        model.fc2.register_forward_hook(lambda *a: 1 / 0)
    before, state = snapshot(model), torch.get_rng_state()
    if fails:
        with pytest.raises(ZeroDivisionError):
            tuner.probe(torch.randn(2, 8, generator=torch.Generator()))
    else:
        tuner.probe(torch.randn(2, 8, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(before, model)


def test_attach_probes_by_itself_and_leaves_modes_and_statistics():
    import timm

    model = timm.create_model("test_resnet").train()
    model.layer1.eval()
    before = snapshot(model)
    tuner = vp.attach(model, vp.LoRA(rank=1), train="fc")
    tuner.detach()
    assert_same(before, model)


def test_a_model_that_cannot_take_the_example_is_a_warning_not_an_error():
    model = vit()
    model.register_forward_pre_hook(lambda m, args: 1 / 0 if args[0].shape[0] == 1 else None)
    with pytest.warns(UserWarning, match=r"liveness is not checked.*1, 3, 32, 32.*ZeroDivisionError"):
        tuner = vp.attach(model, vp.LoRA(rank=1), train="head")
    tuner.probe(image(2))


def test_a_model_that_fails_only_with_the_adapter_is_an_error():
    model = vit()
    before = snapshot(model)

    class Broken(vp.LoRA):
        def build(self, site, module):
            adapter = super().build(site, module)
            adapter.low_rank = lambda: 1 / 0
            return adapter

    with pytest.raises(vp.VisionPEFTError, match="runs alone but not with"):
        vp.attach(model, Broken(rank=1), train="head")
    assert_same(before, model)


def test_only_an_acting_adapter_can_be_probed():
    model = vit()
    tuner = vp.attach(model, vp.LoRA(rank=1), train="head")
    with tuner.disabled(), pytest.raises(vp.VisionPEFTError, match="rests"):
        tuner.probe(image())
    tuner.merge()
    with pytest.raises(vp.VisionPEFTError, match="merged"):
        tuner.probe(image())


def test_each_of_two_adapters_at_one_site_is_seen():
    model = vit()
    vp.attach(model, vp.LoRA(rank=1, targets="linear"), name="a", train="head")
    two = vp.attach(model, vp.SSF(), name="b")
    two.probe(image())
    vp.tuners(model)["a"].probe(image())


def test_outputs_in_containers_are_followed():
    class Dict(Net):
        def forward(self, x):
            return {"a": [x], "b": (None, {"c": super().forward(x)})}

    vp.attach(Dict(), vp.LoRA(rank=1, targets="linear"), train="head").probe(torch.randn(2, 8))
