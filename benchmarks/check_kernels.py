"""Each kernel against its plain definition in float64: on a GPU where there is one, else on the CPU in Triton's interpreter.

    python benchmarks/check_kernels.py                        # on a GPU
    TRITON_INTERPRET=1 python benchmarks/check_kernels.py     # anywhere

One line for each kernel, vocabulary and type: the largest relative error of the loss (float32) and of a row of the gradient, beyond what rounding the logits to
float32 does to the exact value. Exit 1 above 1e-5 (float32) or 2e-2 (bfloat16 logits, compared with the same bfloat16 logits; their gradient is written in
bfloat16). The draw: chi-square against the enumerated law.
"""
import os
import sys
import time

import torch

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import duo.processes as processes
from duo import kernels
from duo.likelihood import score_scale
from duo.processes import Absorbing, Hybrid, Uniform, nucleus

ROWS = 512 if DEVICE == "cuda" else 7
DRAWS = 200_000 if DEVICE == "cuda" else 50
FAILED = []


def line(what, *errors, limit):
    """Prints a result; remembers it where an error is above its limit or no number."""
    good = all(error <= limit for error in errors)
    print(f"{'ok  ' if good else 'FAIL'} {what}: " + ", ".join(f"{error:.1e}" for error in errors), flush=True)
    if not good:
        FAILED.append(what)


def sizes(rows):
    """The size of each number, or of each row."""
    return rows.double().abs() if rows.dim() == 1 else rows.double().norm(dim=-1)


def apart(found, wanted, near=None, kept=0.0):
    """The largest relative distance of two columns, or of the rows of two tables, beyond what rounding of float32 logits alone does (16 times `near` - wanted) and
    beyond `kept`, what float32 keeps of what was subtracted."""
    excess = sizes(found.double() - wanted) - (0 if near is None else 16 * sizes(near - wanted)) - kept
    return (excess.clamp(min=0) / sizes(wanted).clamp(min=1e-300)).max().item() if torch.isfinite(found).all() else float("nan")


def log1p_ratio(c, p, rest):
    """log((1 + c p) / (1 + c)) where rest = 1 - p is known to all its digits."""
    return torch.log1p(-c * rest / (1 + c))


def plain_bound(process, logits, x0, xt, alpha, alpha_dot):
    """The integrand of the bound, (n,), by its definition: a sum of r_j (e^u - 1 - u) over j other than x_t (paper I, Eq. 17)."""
    n, K = logits.shape
    pi = process.prior_at(torch.arange(K, device=logits.device))[None].clamp(min=1e-30)
    o, p = (alpha / (1 - alpha))[:, None], logits.softmax(-1)
    c, one = o / pi, torch.nn.functional.one_hot(x0, K).bool()
    sums = torch.where(one, p.masked_fill(one, 0).sum(-1, keepdim=True), 1 - p)
    level = torch.where(one, log1p_ratio(c, p, sums), torch.log1p(c * p))  # log(1 + c p) - log(1 + c x), x the one-hot of x_0
    u = level - level.gather(-1, xt[:, None])
    true = torch.where(one, 1 + c, 1.0)
    r = pi * true / (pi * true).gather(-1, xt[:, None])
    series = u * u * (1 / 2 + u * (1 / 6 + u * (1 / 24 + u * (1 / 120 + u * (1 / 720 + u / 5040)))))
    cost = r * torch.where(u.abs() < 1e-2, series, torch.expm1(u) - u)
    cost = cost.scatter(-1, xt[:, None], 0.0)
    return -alpha_dot / alpha * process.prior_at(xt) * cost.sum(-1)


def plain_score(process, log_s, x0, xt, alpha, alpha_dot):
    """The score entropy with the model's ratios s_j (SEDD)."""
    K = log_s.shape[-1]
    pi = process.prior_at(torch.arange(K, device=log_s.device))[None]
    q = alpha[:, None] * torch.nn.functional.one_hot(x0, K) + (1 - alpha[:, None]) * pi
    r = q / q.gather(-1, xt[:, None])
    u = log_s - torch.where(r > 0, r, 1.0).log()
    cost = torch.where(r > 0, r * (torch.expm1(u) - u), log_s.exp()).scatter(-1, xt[:, None], 0.0)
    return -alpha_dot / alpha * process.prior_at(xt) * cost.sum(-1)


def plain_kl(p, q):
    """KL(p || q) of finite log probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def differentiated(loss, logits):
    """(loss, gradient) of a function of float64 logits."""
    logits = logits.clone().requires_grad_()
    value = loss(logits)
    value.sum().backward()
    return value.detach(), logits.grad


def rounded(logits):
    """Logits as far away as float32 may put them."""
    return torch.where(logits == -torch.inf, logits, logits * (1 + 2.0**-24 * torch.randn_like(logits)))


def compare(what, loss, inputs, operator, arguments, limit, near=None, kept=0.0):
    """A kernel's loss and gradient against those of `loss`, a function of float64 logits; `near` is that with its other arguments rounded, too."""
    table, bias = inputs
    logits = (table.float() + bias.float()).double()
    (wanted, gradient), (value, slope) = differentiated(loss, logits), differentiated(near or loss, rounded(logits))
    work, (found, factor, alone) = table.clone(), torch.full((3, len(table)), float("nan"), device=DEVICE)
    operator(work, bias, *arguments, True, found, factor)
    operator(table.clone(), bias, *arguments, False, alone, torch.empty_like(alone))
    line(what + f", {table.dtype}".replace("torch.", ""), apart(found, wanted, value), apart(alone, found.double()), limit=1e-5)
    line("     its gradient", apart(work.double() * factor[:, None], gradient, slope, kept), limit=limit)


def tables(K, dtype, gap=True):
    """Logits spread like a trained network's, one of them -inf, and a bias."""
    table = (4 * torch.randn(ROWS, K, device=DEVICE)).to(dtype)
    if gap and K > 8:
        table[::5, 3] = -torch.inf
    return table, torch.randn(K, device=DEVICE)


def bounds(K, dtype, limit):
    """The bound and the score entropy of every prior."""
    alpha = torch.logspace(-5, 0, ROWS, dtype=torch.float64, device=DEVICE).clamp(max=1 - 1e-5)
    slope = -torch.ones_like(alpha)
    for process in (Uniform(K), Hybrid(K, K - 1, 0.3), Absorbing(K, K - 1)):
        mask = process.mask_id
        if mask is not None and K == 2:
            continue
        table, bias = tables(K, dtype)
        x0 = torch.randint(4 if K > 8 else 0, K - (mask is not None), (ROWS,), device=DEVICE)
        xt = torch.where(torch.rand(ROWS, device=DEVICE) < 0.5, x0, torch.randint(4 if K > 8 else 0, K, (ROWS,), device=DEVICE))
        if mask is not None:
            xt[::3] = mask
        name = f"{type(process).__name__}, K = {K:,}"
        if process.p_uniform > 0:
            if mask is not None:
                bias[mask] = -torch.inf
            pi, pi_m = (1 / K, 0.0) if mask is None else (process.p_uniform / (K - 1), 1 - process.p_uniform)
            compare(f"bound, {name}", lambda z: plain_bound(process, z, x0, xt, alpha, slope), (table, bias), kernels.OPS["bound"],
                    (x0, xt, alpha, slope, pi, pi_m, -1 if mask is None else mask), limit)
        table, bias = tables(K, dtype, gap=False)
        smooth = process.p_uniform > 0
        at = torch.arange(0, ROWS, 1 if smooth else 3, device=DEVICE)
        levels = (1 / K, 0.0) if mask is None else (process.p_uniform / (K - 1), 1 - process.p_uniform)
        shift = 0.0 if smooth else score_scale(process, alpha[at])[:, None]
        compare(f"score entropy, {name}", lambda z: plain_score(process, z - shift, x0[at], xt[at], alpha[at], slope[at]), (table[at], bias),
                kernels.OPS["score"], (x0[at], xt[at], alpha[at], slope[at], *levels, -1 if mask is None else mask, smooth), limit)


def entropies(K, dtype, limit):
    """The cross entropy, without and with a mask, and the KL both ways."""
    target = torch.randint(4 if K > 8 else 0, max(K - 1, 1), (ROWS,), device=DEVICE)
    scale = torch.rand(ROWS, dtype=torch.float64, device=DEVICE)
    scale[1] = 0
    for skip in (-1, K - 1) if K > 2 else (-1,):
        def loss(z):
            z = z if skip < 0 else z.index_fill(-1, torch.tensor(skip, device=z.device), -torch.inf)
            return -scale * z.log_softmax(-1).gather(-1, target[:, None])[:, 0]
        compare(f"cross entropy{'' if skip < 0 else ' without the mask'}, K = {K:,}", loss, tables(K, dtype), kernels.OPS["entropy"], (target, scale, skip), limit)
    (table, bias), (_, other_bias) = tables(K, dtype), tables(K, dtype)
    other = (table.float() + torch.randn_like(table.float()) / 2).to(dtype)
    low = lambda z: z.masked_fill(z == -torch.inf, -1e4).log_softmax(-1)  # what underflows costs nothing
    logits = (other.float() + other_bias).double()
    for forward in (False, True):
        def loss(z, q=low(logits)):
            return plain_kl(q, low(z)) if forward else plain_kl(low(z), q)
        compare(f"KL, {'forward' if forward else 'reverse'}, K = {K:,}", loss, (table, bias), kernels.OPS["kl"], (other, other_bias, forward), limit,
                lambda z: loss(z, low(rounded(logits))), 2.0**-22)  # of p and q, which are up to 1


def draws(K, settings):
    """p-values of the draw against the enumerated law; the smallest counts."""
    from scipy.stats import chi2
    processes._kernels = lambda like: kernels  # in the interpreter, too
    generator, logits, worst = torch.Generator(DEVICE).manual_seed(1), 1.5 * torch.randn(K, device=DEVICE), []
    logits[0] = logits[2]  # a tie at the edge of a nucleus is decided by index
    for process in (Uniform(K), Absorbing(K, K - 1), Hybrid(K, K - 1, 0.5)):
        for z in (0, K - 1):
            for alpha_s, kappa, top_p in settings:
                n = DRAWS
                xt = torch.full((1, n), z, device=DEVICE)
                x = process.draw(lambda ids: logits.expand(len(ids), K).contiguous(), xt, alpha_s, 0.3, kappa, top_p, generator)[0]
                p = logits.double().masked_fill(torch.arange(K, device=DEVICE) == (process.mask_id if process.hides_mask else -1), -torch.inf).softmax(-1)
                if top_p < 1:
                    p = nucleus(p.float()[None], top_p)[0].double()
                law = process.posterior(p[None, None] / p.sum(), xt[:, :1], alpha_s, 0.3, kappa)[0, 0]
                seen, possible = torch.bincount(x, minlength=K).double(), law > 0
                assert seen[~possible].sum() == 0, f"a token of probability 0 was drawn: {process}, {z}, {alpha_s}, {kappa}, {top_p}"
                statistic = ((seen - n * law)[possible] ** 2 / (n * law)[possible]).sum().item()
                if possible.sum() > 1:
                    worst.append(chi2.sf(statistic, int(possible.sum()) - 1))
    line(f"draw, K = {K:,}, {len(worst)} laws, {DRAWS:,} draws each: 1e-4 / the smallest of {len(worst)} p-values", 1e-4 / min(worst), limit=1.0)


if __name__ == "__main__":
    torch.manual_seed(0)
    start = time.time()
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else "a CPU, in Triton's interpreter"
    print(f"on {where}; torch {torch.__version__}, triton {kernels.triton.__version__}; errors of the loss with and without gradient, then of the gradient")
    for K in (2, 11, 1000, 50257):
        if DEVICE == "cpu":
            ROWS = 3 if K > 10_000 else 7
        for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            bounds(K, dtype, limit)
            entropies(K, dtype, limit)
    every = [(a, k, p) for a in (0.6, 1.0) for k in (1.0, 0.7) for p in (1.0, 0.7, 0.3)]
    draws(11, every if DEVICE == "cuda" else [(0.6, 0.7, 1.0), (1.0, 1.0, 0.7)])
    print(f"{len(FAILED)} failed; {time.time() - start:.0f} s")
    sys.exit(bool(FAILED))
