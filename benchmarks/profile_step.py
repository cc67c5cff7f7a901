"""Where the time of a training step and of a sampling step goes on a GPU: python benchmarks/profile_step.py. The papers' small model, 32 x 1,024 tokens, bfloat16.

A table of kernels for the bare network (a fixed gradient of the logits), Duo and a distillation step, compiled blocks; milliseconds on the card a step."""
import copy
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile

from duo.distillation import dcd_loss, path_pair
from duo.dit import DiT, DiTConfig, precise
from duo.duality import gamma_window
from duo.processes import Uniform
from duo.samplers import sample_ar
from duo.schedules import LogLinear
from duo.training import bound

K, B, L, D, N = (50257, 32, 1024, 768, 12) if torch.cuda.is_available() else (101, 2, 16, 32, 2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(1)
net = DiT(DiTConfig(K, D, N, N, 128, 0.0)).to(DEVICE)
torch.nn.init.normal_(net.head.weight, std=4 / D**0.5)
teacher = copy.deepcopy(net).requires_grad_(False)
for block in net.blocks if DEVICE == "cuda" else ():
    block.compile()
x0, process, schedule = torch.randint(K, (B, L), device=DEVICE), Uniform(K), LogLinear()
sigma, gradient = torch.full((B,), 0.7, device=DEVICE), torch.randn(B, L, K, device=DEVICE) / (B * L * K)
window = gamma_window(K, 1e-3, 0.99)


def distillation():
    dcd_loss(net, teacher, path_pair(x0, torch.rand(B, device=DEVICE), 1 / 64, window, K), promised=True).mean().backward()


def body():
    h = net.hidden(x0, sigma)
    h.backward(torch.ones_like(h))


steps = {"the network without its head": body, "the bare network": lambda: net(x0, sigma).backward(gradient),
         "Duo": lambda: bound(net, process, schedule, x0, promised=True).mean().backward(), "distillation": distillation}
wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
for name, step in steps.items():
    with precise(DEVICE, "bf16"):
        for _ in range(3):
            step()
        wait()
        start = time.perf_counter()
        for _ in range(5):
            step()
        wait()
        spent = (time.perf_counter() - start) / 5
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")) as prof:
            step()
            wait()
    print(f"\n{name}: {1e3 * spent:.1f} ms a step", flush=True)
    events = sorted(prof.key_averages(), key=lambda e: -e.self_device_time_total)[:14]
    for e in events:
        if e.self_device_time_total:
            print(f"{e.self_device_time_total / 1e3:9.2f} ms {e.count:6d} x {e.key[:110]}")

causal = DiT(DiTConfig(K, D, N, N, 128, 0.0, causal=True)).to(DEVICE).eval()
torch.nn.init.normal_(causal.head.weight, std=4 / D**0.5)
for rows, length in ((1, 1024), (16, 1024)) if DEVICE == "cuda" else ((2, 8),):
    with torch.no_grad(), precise(DEVICE, "bf16"):
        sample_ar(causal, (rows, 8), K - 1)
        wait()
        start = time.perf_counter()
        sample_ar(causal, (rows, length), K - 1)
        wait()
        spent = time.perf_counter() - start
        text, calls = torch.zeros(rows, length // 2, dtype=torch.long, device=DEVICE), 5
        causal(text)
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            causal(text)[:, -1:]
        wait()
    print(f"autoregressive, {rows} x {length}: {1e3 * spent / length:.2f} ms a token with the cache, {1e3 * (time.perf_counter() - start) / calls:.2f} to read half of the text again")
