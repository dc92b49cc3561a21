"""DDP and FSDP2 on two CPU processes: the same outputs and the same gradients as one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import zoo
from torch import Tensor, nn

# One of each way to act: fused low rank, weights lent, branches with taps, copies that learn in place, tokens, MHA.
CASES = [zoo.Case(*c) for c in (("lora", "vit"), ("ssf", "vit"), ("houlsby", "vit"), ("bitfit", "vit"), ("vpt", "vit"),
                                ("fact_tt", "vit"), ("rein", "vit"),
                                ("lora", "beit"), ("lora", "efficientnet"), ("lora", "encoder"))]  # fmt: skip


def rows(case: zoo.Case) -> tuple[Tensor, ...]:
    return zoo.inputs(case.backbone, batch=4)


def alone(case: zoo.Case) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Output, gradients and parameters after one step of one process with the whole batch."""
    model, tuner = zoo.tune(case)
    out = model(*rows(case))
    out.square().mean().backward()
    wanted = {id(p) for p in tuner.parameters()}
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if id(p) in wanted}
    torch.optim.SGD(tuner.parameters(), lr=0.1).step()
    return out.detach(), grads, {n: p.detach() for n, p in model.named_parameters() if id(p) in wanted}


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    stack = model.blocks if hasattr(model, "blocks") else model.encoder.layers
    for block in stack:
        fully_shard(block)
    return fully_shard(model)


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def check(case: zoo.Case, wrap, rank: int) -> None:
    out, grads, after = alone(case)
    model, tuner = zoo.tune(case)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if n not in grads}
    wrapped = wrap(model)
    mine = tuple(t[2 * rank : 2 * rank + 2] for t in rows(case))
    y = wrapped(*mine)
    torch.testing.assert_close(y, out[2 * rank : 2 * rank + 2], rtol=1e-4, atol=1e-5)
    y.square().mean().backward()
    learnt = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(learnt) == set(grads)
    for name, p in learnt.items():
        torch.testing.assert_close(whole(p.grad), grads[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for name, p in model.named_parameters():
        expected = after[name] if name in after else base[name]
        exact = {} if name in after else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(whole(p.detach()), expected, **exact)
    wrapped(*mine)
    assert {id(p) for p in tuner.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        for case in CASES:
            for wrap in (ddp, fsdp):
                if wrap is fsdp and case.backbone == "efficientnet":
                    continue
                try:
                    check(case, wrap, rank)
                except Exception as error:
                    raise AssertionError(f"{case} under {wrap.__name__}: {error}") from error
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=2)
