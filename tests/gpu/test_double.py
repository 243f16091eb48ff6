"""The double refuses what CUDA refuses, computes what the CPU computes, and counts."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from cuda_double import Counted, CudaDouble

CPU = torch.arange(6.0).reshape(2, 3)


@pytest.fixture
def x(doubles: Counted) -> Tensor:
    return CPU.to("cuda")


def test_it_says_that_it_is_on_a_gpu_and_computes_as_the_cpu(x: Tensor) -> None:
    assert x.device == torch.device("cuda:0") and x.is_cuda and not x.is_cpu and isinstance(x @ x.T, CudaDouble)
    values, vectors = torch.linalg.eigh(x @ x.T)
    parts = (
        x.T,
        x[0],
        x.new_zeros(2),
        torch.zeros(2, device="cuda"),
        torch.zeros_like(x),
        x.split(1)[1],
        values,
        vectors,
        x.double(),
    )
    assert all(part.device == torch.device("cuda:0") for part in parts)
    assert torch.equal((x @ x.T).cpu(), CPU @ CPU.T) and x.cpu().device.type == "cpu" and x.sum().item() == 15
    assert torch.zeros(1, device="cuda:1").device == torch.device("cuda:1") == x.to("cuda:1").device
    assert torch.equal(x.to(torch.zeros(1)), CPU) and x.to(CPU).device.type == "cpu"


def test_a_copy_is_other_memory(x: Tensor) -> None:
    back = x.cpu()
    back += 1
    assert float(x[0, 0]) == 0 and x.to("cuda:0") is x


REFUSED: dict[str, Callable[[Tensor], object]] = {
    "an operand on the host": lambda x: x + torch.ones(3),
    "an operand on another GPU": lambda x: x + torch.ones(3, device="cuda:1"),
    "a number on another GPU": lambda x: x + torch.ones((), device="cuda:1"),
    "a list with a part on the host": lambda x: torch.cat([x, torch.ones(2, 3)]),
    "an output on the host": lambda x: torch.add(x, x, out=torch.empty(2, 3)),
    "an index on the GPU into the host": lambda x: CPU[x[0].long() > 0],
    "numpy": lambda x: x.numpy(),
    "an address": lambda x: x.data_ptr(),
    "a generator of the host": lambda x: torch.randn(3, device="cuda", generator=torch.Generator()),
    "a generator of the host in place": lambda x: x.normal_(generator=torch.Generator()),
    "a GPU that is not there": lambda x: x.to("cuda:2"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses(x: Tensor, what: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match=r"cuda|CUDA|device"):
        REFUSED[what](x)


def test_what_cuda_lets_pass(x: Tensor) -> None:
    assert torch.equal((x + torch.tensor(1.0)).cpu(), CPU + 1)  # a number of the host
    assert torch.equal(x[:, torch.tensor([0, 2])].cpu(), CPU[:, [0, 2]])  # an index of the host
    assert torch.equal(x.clone().copy_(torch.ones(2, 3)).cpu(), torch.ones(2, 3))
    here = torch.ones(2, 3)
    assert here.copy_(x) is here and torch.equal(here, CPU)  # a copy to the host stays there
    assert torch.linalg.svdvals(x, driver="gesvd").device.type == "cuda"


def test_it_counts_calls_waits_and_threads(x: Tensor, doubles: Counted) -> None:
    doubles.calls.clear()
    y = (x @ x.T)[0].flatten()
    assert doubles.launches == 1 and doubles.waits == 0
    float(y.sum()), y.tolist(), x[x > 1], y.cpu()
    assert doubles.waited == {"__float__": 1, "tolist": 1, "boolean index": 1, "cpu": 1}
    with ThreadPoolExecutor(1, thread_name_prefix="other") as pool:
        assert pool.submit(lambda: torch.ones(2, device="cuda:1").device).result() == torch.device("cuda:1")
    assert doubles.threads["ones"] == ["other_0"]


def test_a_model_moves_and_learns(doubles: Counted) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).to("cuda")
    assert all(p.device.type == "cuda" and p.is_leaf and p.requires_grad for p in model.parameters())
    before = model.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(CPU.to("cuda")).square().sum().backward()
    assert model.weight.grad is not None and model.weight.grad.device.type == "cuda"
    optimizer.step()
    assert bool((model.weight != before).all())
    optimizer.state[model.weight]["step"] = torch.tensor(1.0)  # on the host, where a fused step does not count
    with pytest.raises(RuntimeError, match="fused"):
        optimizer.step()


def test_solvers_fail_on_demand(x: Tensor, doubles: Counted) -> None:
    doubles.failing.add("eigh")
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.eigh(x @ x.T)
    torch.linalg.eigh(CPU @ CPU.T)
