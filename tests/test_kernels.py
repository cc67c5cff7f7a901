"""The kernels of an accelerator in Triton's interpreter, each against its plain definition in float64."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton")


def interpreted(*command):
    """What a command prints when Triton's kernels are interpreted."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@triton
def test_kernels_against_plain_definitions():
    out = interpreted("benchmarks/check_kernels.py")
    assert "0 failed" in out and out.count("ok ") > 100


HEADS = """
import torch
import duo.kernels
import duo.likelihood as l
from duo.processes import Absorbing, Hybrid, Uniform

torch.manual_seed(0)
K, shape = 70, (3, 5)
x0, parts = torch.randint(K - 1, shape), [torch.randn(*shape, 16), torch.randn(K, 16), torch.randn(K)]
other, weights = (torch.randn(*shape, 16), torch.randn(K, 16)), torch.rand(shape)
cases = {"ar": lambda *h: l.linear_ar_nll(*h, x0, 8, weights)}
for d in ("forward", "reverse"):
    cases[d] = lambda *h, d=d: l.linear_kl(*h, *other, None, d, 8, weights)
for P in (Uniform(K), Hybrid(K, K - 1, 0.4), Absorbing(K, K - 1)):
    xt = P.corrupt(x0, 0.5)
    for f in (l.linear_nelbo, l.linear_score_nelbo):
        cases[f"{P} {f.__name__}"] = lambda *h, P=P, f=f, xt=xt: f(P, *h, x0, xt, 0.5, -1.0, 8, weights, PROMISED)
for name, loss in cases.items():
    found = []
    for kernels, PROMISED in ((None, False), (duo.kernels, True)):
        l._kernels = lambda like: kernels
        tensors = [v.clone().requires_grad_() for v in parts]
        nats = loss(*tensors)
        (nats * weights).sum().backward()
        found.append([nats.detach(), *(v.grad for v in tensors)])
    for a, b in zip(*found):
        assert (a - b).norm() < 1e-5 * a.norm(), (name, a, b)
    print(name)
"""


@triton
def test_losses_from_hidden_states():
    assert len(interpreted("-c", HEADS).splitlines()) == 9


AUTOGRAD = """
import torch
from duo import kernels
torch.manual_seed(0)
table, bias = torch.randn(3, 7, requires_grad=True), torch.randn(7, requires_grad=True)
target, scale = torch.tensor([1, 2, 6]), torch.ones(3, dtype=torch.float64)
loss = torch.ops.duo.entropy(table, bias, target, scale, -1)
(loss * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
t, b = (v.detach().clone().requires_grad_() for v in (table, bias))
(torch.nn.functional.cross_entropy(t + b, target, reduction="none") * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
assert torch.allclose(table.grad, t.grad, atol=1e-6) and torch.allclose(bias.grad, b.grad, atol=1e-6)
with torch._subclasses.FakeTensorMode():
    loss = torch.ops.duo.entropy(torch.empty(3, 7), None, torch.empty(3, dtype=torch.long), torch.empty(3, dtype=torch.float64), -1)
    assert loss.shape == (3,) and loss.dtype == torch.float32
print("ok")
"""


@triton
def test_operators_have_an_autograd_and_a_fake():
    assert interpreted("-c", AUTOGRAD) == "ok\n"
