"""What has to be right on a GPU before anything is timed there: python benchmarks/check_gpu.py. One line for each check; exit 1 if one fails.

The kernels (check_kernels.py), the losses from hidden states against the CPU in float64, a training step of each method, compiled blocks against plain ones,
an autoregressive sample with its cache against one without, and samples in bfloat16 against float32 by chi-square.
"""
import subprocess
import sys
import time
from pathlib import Path

import torch
from scipy.stats import chi2

import duo.dit
from duo.curriculum import Curriculum
from duo.dit import DiT, DiTConfig
from duo.likelihood import METHODS, linear_ar_nll, linear_kl, linear_nelbo, linear_score_nelbo, make_process, network_vocab
from duo.processes import Absorbing, Hybrid, Uniform
from duo.samplers import Psi, sample, sample_ar
from duo.schedules import LogLinear
from duo.training import Training

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = DEVICE == "cpu"  # shows only that this file runs
FAILED = []


def line(what, good, detail):
    """Prints a result; remembers it where it is not good."""
    print(f"{'ok  ' if good else 'FAIL'} {what}: {detail}", flush=True)
    if not good:
        FAILED.append(what)


def losses(K, D=64, shape=(3, 50)):
    """Each loss from hidden states in float32 here against float64 on the CPU: value and the gradients of hidden states, weight and bias."""
    x0, parts = torch.randint(4, K - 1, shape), [torch.randn(*shape, D), torch.randn(K, D) * 0.2, torch.randn(K) * 0.1]
    other, weights = [torch.randn(*shape, D), torch.randn(K, D) * 0.2], torch.rand(shape)
    cases = {"KL": (lambda h, w, b, on: linear_kl(h, w, b, *(v.to(h) for v in other), None, weights=on(weights)))}
    cases["autoregressive"] = lambda h, w, b, on: linear_ar_nll(h, w, b, on(x0), weights=on(weights))
    for process in (Uniform(K), Hybrid(K, K - 1, 0.4), Absorbing(K, K - 1)):
        xt = process.corrupt(x0, 0.5)
        for name, loss in (("nelbo", linear_nelbo), ("score", linear_score_nelbo)):
            cases[f"{name}, {type(process).__name__}"] = lambda h, w, b, on, P=process, z=xt, f=loss: f(P, h, w, b, on(x0), on(z), 0.5, -1.0, weights=on(weights))
    for name, loss in cases.items():
        found = []
        for device, dtype in (("cpu", torch.float64), (DEVICE, torch.float32)):
            tensors = [v.to(device, dtype, copy=True).requires_grad_() for v in parts]
            nats = loss(*tensors, lambda v: v.to(device))
            (nats * weights.to(nats)).sum().backward()
            found.append([nats.detach(), *(v.grad for v in tensors)])
        errors = [((b.cpu().double() - a).norm() / a.norm()).item() for a, b in zip(*found)]
        line(f"{name}, from hidden states, K = {K:,}", max(errors) < 1e-4, "loss and gradients of hidden, weight, bias " + ", ".join(f"{e:.1e}" for e in errors))


def training_steps(K, shape, compile):
    """A bfloat16 step of each method: loss and gradients finite."""
    b, length = shape
    for method in METHODS:
        row = METHODS[method]
        config = DiTConfig(network_vocab(method, K), 128, 2, 2, 64, 0.1, row.prior is None, method != "mdlm")
        soft = {"duo": Curriculum(None), "duopp": Curriculum(3)}.get(method)
        options = dict(p_uniform=0.2 if row.prior == "hybrid" else None, T=1000 if row.objective == "steps" else None)
        module = Training(config, method, vocab_size=K, schedule=row.schedule, curriculum=soft, batch_size=b, max_steps=2, compile=compile, **options).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = module.training_step((torch.randint(K, shape, device=DEVICE), 0, 0, {}), 0)
        loss.backward()
        finite = all(torch.isfinite(p.grad).all() for p in module.net.parameters() if p.grad is not None)
        line(f"a training step of {method}{', blocks compiled' if compile else ''}", bool(torch.isfinite(loss)) and finite, f"{loss.item():.4f} nats a token")
        if compile:
            return


def compiled():
    """Compiled blocks against plain ones: the same hidden states up to bfloat16."""
    torch.manual_seed(0)
    net = DiT(DiTConfig(1000, 128, 2, 2, 64, 0.0)).to(DEVICE).eval()
    for name, p in net.named_parameters():
        if "adaLN" in name:
            torch.nn.init.normal_(p, std=0.05)
    x, sigma = torch.randint(1000, (4, 128), device=DEVICE), torch.full((4,), 0.7, device=DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        plain = net.hidden(x, sigma).float()
        for block in net.blocks:
            block.compile()
        error = ((net.hidden(x, sigma).float() - plain).norm() / plain.norm()).item()
    line("compiled blocks against plain ones", error < 2e-2, f"{error:.1e}")


def cached():
    """Greedy autoregressive text with the cache and without it."""
    torch.manual_seed(0)
    net = DiT(DiTConfig(50, 64, 2, 2, 32, 0.0, causal=True)).to(DEVICE).eval()
    torch.nn.init.normal_(net.head.weight, std=0.3)
    texts = [sample_ar(net, (4, 24), 49, draw=False, cache=cache) for cache in (True, False)]
    line("autoregressive text, with and without cache", torch.equal(*texts), f"{(texts[0] == texts[1]).double().mean().item():.3f} of the tokens are the same")


def sampled(n):
    """Single tokens and pairs of neighbours of samples in bfloat16 and in float32 by a chi-square test of two samples."""
    K, L = 6, 4
    torch.manual_seed(0)
    net = DiT(DiTConfig(K, 64, 2, 2, 32, 0.0)).to(DEVICE).eval()
    torch.nn.init.normal_(net.head.weight, std=0.1)
    masked = DiT(DiTConfig(K + 1, 64, 2, 2, 32, 0.0, time_conditioning=False)).to(DEVICE).eval()
    torch.nn.init.normal_(masked.head.weight, std=0.1)
    for process, model in ((Uniform(K), net), (Absorbing(K + 1, K), masked)):
        for top_p in (1.0, 0.8):
            counts = []
            for seed, low in ((1, False), (2, True)):
                with torch.autocast(DEVICE, torch.bfloat16, enabled=low):
                    x = sample(model, process, LogLinear(), (n, L), 8, Psi(0.9), top_p=top_p, generator=torch.Generator(DEVICE).manual_seed(seed))
                counts.append(torch.bincount((x[:, 0] * (K + 1) + x[:, 1]).cpu(), minlength=(K + 1) ** 2).double())
            a, b = counts
            seen = a + b > 0
            p = chi2.sf(((a - b)[seen] ** 2 / (a + b)[seen]).sum().item(), int(seen.sum()) - 1)
            line(f"samples in bfloat16 against float32, {type(process).__name__}, top_p {top_p}", p > 1e-4, f"p = {p:.3f}, {n:,} samples")


if __name__ == "__main__":
    start = time.time()
    torch.manual_seed(0)
    print(f"on {torch.cuda.get_device_name() if DEVICE == 'cuda' else 'a CPU'}; torch {torch.__version__}; flash-attn "
          + ("absent: torch's own attention serves" if duo.dit._flash is None else "present"))
    if DEVICE == "cuda":
        done = subprocess.run([sys.executable, Path(__file__).with_name("check_kernels.py")], timeout=100)
        line("kernels", done.returncode == 0, f"exit status {done.returncode}, {time.time() - start:.0f} s")
    losses(301 if SMALL else 5003)
    training_steps(211 if SMALL else 50257, (2, 8) if SMALL else (4, 256), False)
    cached()
    sampled(200 if SMALL else 10_000)
    if not SMALL:
        compiled()
        training_steps(50257, (4, 256), True)
    print(f"{len(FAILED)} failed; {time.time() - start:.0f} s")
    sys.exit(bool(FAILED))
