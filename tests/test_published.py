"""The parameter files of the papers' scale against the published settings, number by number."""
import math
from pathlib import Path

import pytest
import yaml

from duo.duality import gamma_window
from duo.samplers import make_sampler, plan
from duo.schedules import LogLinear

PARAMETERS = Path(__file__).resolve().parents[1] / "parameters"


def files(verb, pattern="*"):
    """{name: values} of the parameter files of a verb."""
    return {p.stem: yaml.safe_load(p.read_text()) for p in sorted((PARAMETERS / verb).glob(f"{pattern}.yaml"))}


TRAIN = files("train")
TEXT = dict(
    backbone="dit", hidden_size=768, n_blocks=12, n_heads=12, cond_dim=128, dropout=0.1, batch_size=512, max_steps=1_000_000, start=None,
    lr=3e-4, lr_decay="constant", warmup_steps=2500, weight_decay=0.0, betas=[0.9, 0.999], adam_eps=1e-8, grad_clip=1.0, ema=0.9999,
    precision="bf16", schedule="log-linear", schedule_eps=1e-3, times="low-discrepancy", t_min=1e-3, loss_type="elbo",
)  # fmt: skip
LM1B = TEXT | dict(tokenizer="bert-base-uncased", length=128)
OWT = TEXT | dict(tokenizer="gpt2", length=1024)
IMAGES = TEXT | dict(
    data="cifar10", tokenizer="pixels", length=3072, backbone="unet", hidden_size=128, ch_mult=[1, 2, 2, 2], n_blocks=2, n_heads=1, attn_level=1,
    head="logistic", label_dropout=0.1, batch_size=128, max_steps=1_500_000, lr=2e-4, warmup_steps=5000, precision="32", schedule="cosine", flip=False,
)  # fmt: skip
SETS = {  # the beginning of a name, what all files of that name have in common
    "lm1b_packed": LM1B | dict(data="lm1b-packed"),
    "lm1b": LM1B | dict(data="lm1b"),
    "owt": OWT | dict(data="openwebtext"),
    "fineweb_edu": OWT | dict(data="fineweb-edu"),
    "text8": TEXT | dict(data="text8-crop", tokenizer="text8", length=256),
    "cifar10": IMAGES,
}
WINDOWS = {"lm1b": (30_522, -3.5, -1.75), "owt": (50_257, -3.55, -1.85), "fineweb_edu": (50_257, -3.55, -1.85)}
OTHERWISE = {  # D3PM as paper I quotes it; the two halves of the published fine-tuning
    "owt_d3pm": dict(max_steps=1_300_000),
    "owt_duo_500k": dict(max_steps=500_000, curriculum_steps=500_000),
    "owt_duo_finetune": dict(max_steps=500_000, start="outputs/train/owt_duo_500k/checkpoints", start_averaged=False, method="duo", curriculum="none"),
}
PAPER = {name: next(v for k, v in SETS.items() if name.startswith(k)) for name in TRAIN if name.startswith(tuple(SETS))}


@pytest.mark.parametrize("name", PAPER)
def test_training_settings(name):
    wanted = PAPER[name] | (dict(schedule="log-linear") if name.endswith("_loglinear") else {})
    wanted |= dict(T=1000 if TRAIN[name]["method"] == "d3pm" else None) | OTHERWISE.get(name, {})
    assert {key: TRAIN[name][key] for key in wanted} == wanted


@pytest.mark.parametrize("name", [n for n in PAPER if TRAIN[n]["curriculum"] != "none" and not n.startswith(("cifar10", "text8"))])
def test_curriculum(name):
    given = TRAIN[name]
    top_k = given["method"] == "duopp"
    wanted = dict(curriculum="top-k" if top_k else "dense", curriculum_steps=500_000, tau=1e-3, tau_end=None, top_k=2 if top_k else None)
    assert {key: given[key] for key in wanted} == wanted
    vocab_size, *window = next(v for k, v in WINDOWS.items() if name.startswith(k))
    assert gamma_window(vocab_size, given["alpha_min"], given["alpha_max"]) == pytest.approx(window, abs=2e-3)


@pytest.mark.parametrize("name", TRAIN)
def test_who_is_told_the_time(name):
    assert TRAIN[name]["time_conditioning"] is (TRAIN[name]["method"] != "mdlm"), "MDLM is published without time conditioning, the others with"


@pytest.mark.parametrize("name", ["owt_duo", "owt_duo_ema", "owt_mdlm_sdtt"])
def test_distillation(name):
    given = files("distil", name)[name]
    wanted = dict(rounds=5, steps_per_round=10_000, delta=1 / 512, growth="doubling", delta_max=None, divergence="reverse", match="denoiser",
                  batch_size=128, lr=6e-5, warmup_steps=500, weight_decay=0.0, grad_clip=1.0, ema=0.999, teacher="ema" if name == "owt_duo_ema" else "student")
    assert {key: given[key] for key in wanted} == wanted
    if name != "owt_mdlm_sdtt":
        assert given["averaged"] is False
        for vocab_size in (50_257, 50_258):
            assert gamma_window(vocab_size, given["alpha_min"], given["alpha_max"]) == pytest.approx((-4.0, -1.0), abs=1e-3)


PSI = {  # kappa and its rates in the published runs: on text with the nucleus, on CIFAR-10
    "rescale": (dict(kappa="rescale-min", eta=0.05, top_p=0.9), dict(kappa="rescale-min", eta=0.01)),
    "cap": (dict(kappa="cap", eta=0.01, top_p=0.9), dict(kappa="cap", eta=0.005)),
    "loop": (dict(kappa="loop", eta=0.01, top_p=0.95), dict(kappa="loop", eta=0.01)),
}
MIDDLE = {"duo": dict(kappa=0.95, high_frac=0.5, middle_frac=0.4), "mdlm": dict(kappa=0.99, high_frac=0.0, middle_frac=0.9)}
SAMPLERS = [(f"sample/owt_{m}_{kind}", v[0] | dict(n=512)) for m in ("duopp", "mdlm") for kind, v in PSI.items()]
SAMPLERS += [(f"{verb}/cifar10_{m}_{kind}", v[1] | dict(steps=[256])) for verb in ("fid", "sample") for m in ("duo", "mdlm") for kind, v in PSI.items()]
SAMPLERS += [(f"{verb}/cifar10_{m}_psi", v | dict(steps=[256])) for verb in ("fid", "sample") for m, v in MIDDLE.items()]


@pytest.mark.parametrize("name, wanted", SAMPLERS, ids=[name for name, _ in SAMPLERS])
def test_psi_samplers(name, wanted):
    given = yaml.safe_load((PARAMETERS / f"{name}.yaml").read_text())
    wanted = wanted | dict(sampler="psi", tail="sample", guidance=[1.0])
    assert {key: given[key] for key in wanted} == wanted
    if wanted["kappa"] == "loop":  # held at alpha = 0.9 after 45 % of the calls, for 50 % of them
        assert (given["alpha_on"] or 0.9, given["t_on"] or 0.55, given["t_off"] or 0.05) == (0.9, 0.55, 0.05)


def test_rescaled_as_published():
    """kappa of the file from the published formula, sigma = eta min(eta, (1 - a_s) / a_t); at eta = 0.01 ReMDM's is up to 100 times as much."""
    given = yaml.safe_load((PARAMETERS / "fid/cifar10_mdlm_rescale.yaml").read_text())
    rate, apart = given["eta"], []
    for step in plan(LogLinear(), given["steps"][0], make_sampler("psi", kappa=given["kappa"], eta=rate))[:-1]:
        left = (1 - step.alpha_s) / step.alpha_t
        sigma = rate * min(rate, left)
        assert math.isclose(step.kappa, 1 - sigma / (1 - step.alpha_s), rel_tol=1e-12)
        apart.append(rate * min(1, left) / sigma)
    assert max(apart) == pytest.approx(1 / rate, rel=1e-9)


def test_other_samplers():
    """The rows of table 5: T updates and one call more, at t = 0.00001; SEDD with masks by the analytic sampler, MDLM with a cache; FID of 50,000 with their labels."""
    for name, given in files("sample", "owt_*").items():
        if given["steps"][0] == 9:
            assert given["steps"] == [2**n + 1 for n in range(3, 11)] and given["t_last"] == 1e-5 and given["top_p"] == 1.0 and given["n"] == 1024, name
            assert given["sampler"] == {"owt_sedd_absorb": "analytic", "owt_mdlm": "cached", "owt_mdlm_sdtt": "cached"}.get(name, "ancestral"), name
    for given in files("fid", "cifar10_*").values():
        assert (given["n"], given["split"], given["labelled"], given["guidance"], given["metric"]) == (50_000, "train", True, [1.0], "fid")
    for verb in ("train", "likelihood", "sample", "fid"):
        assert {given["precision"] for given in files(verb, "cifar10_*").values()} == {"32"}, "published in float32"
    for given in files("zero_shot").values():
        assert given["data"] == ["ptb", "wikitext2", "wikitext103", "lm1b", "lambada", "ag_news", "pubmed", "arxiv"]
        assert (given["split"], given["length"], given["separator"]) == ("valid", 1024, "none")
