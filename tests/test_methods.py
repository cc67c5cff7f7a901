"""Every row of the table of methods trains, is saved, and writes; one of them by the command."""
import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from duo.curriculum import Curriculum
from duo.data import Batches, documents, pack, tokenizer
from duo.dit import DiTConfig
from duo.hub import Model, load, save
from duo.likelihood import METHODS, network_vocab
from duo.metrics import generative_perplexity
from duo.samplers import Analytic
from duo.training import Training, fit

ROOT = Path(__file__).resolve().parents[1]
NEEDS = {"d3pm": {"T": 8}, "gidd": {"p_uniform": 0.2}}


@pytest.fixture(scope="module")
def text():
    return pack([documents("austen")[0][:20000]], tokenizer("char"), 32)


@pytest.mark.parametrize("method", METHODS)
def test_trained_saved_and_sampled(method, text, tmp_path):
    row, needs, V = METHODS[method], NEEDS.get(method, {}), text.tokenizer.vocab_size
    soft = Curriculum(3, 1e-3, 1) if "top-k" in row.curriculum else None
    module = Training(DiTConfig(network_vocab(method, V), 16, 1, 2, 8, causal=method == "ar"), method, vocab_size=V, schedule=row.schedule, curriculum=soft,
                      batch_size=4, max_steps=2, **needs)
    result = fit(module, Batches(text, 4, 0), text[:4], tmp_path / "run", max_steps=2, valid_every=2, checkpoint_every=2)
    assert 0 < result["valid_nll"] < 1.5 * math.log(V)
    model = Model(module.ema, method, row.schedule, text.tokenizer, 32, **needs)
    back = load(save(model, tmp_path / "model"))
    texts = back.sample(2, steps=4, seed=0)
    assert texts == model.sample(2, steps=4, seed=0) and all(len(back.encode(t)) == 32 for t in texts)
    assert (back.T, back.p_uniform) == (needs.get("T"), needs.get("p_uniform")) and back.nll(texts).nats.isfinite().all()
    if row.objective == "score":
        assert len(back.sample(1, steps=4, sampler=Analytic(), seed=0)[0]) == 32


def test_by_the_command(tmp_path):
    words = ["tokenizer=char", "length=32", "hidden_size=16", "n_blocks=1", "n_heads=2", "cond_dim=8", "batch_size=4", "max_steps=2", "warmup_steps=1", "valid_every=2",
             "valid_blocks=4", "checkpoint_every=2", "T=8"]
    run = [sys.executable, "-c", "from duo.runs import main; raise SystemExit(main())", "train/method_d3pm", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*run, "lr=0.1", "--output", str(tmp_path)], cwd=ROOT, env=env, check=True, capture_output=True)
    assert json.loads((tmp_path / "metrics.json").read_text())["method"] == "d3pm"
    assert json.loads((tmp_path / "checkpoints" / "config.json").read_text())["T"] == 8
    judged, place = ["valid_samples=3", "judge=outputs/train/austen_ar/checkpoints"], tmp_path / "again"
    words = [f"start={tmp_path / 'checkpoints'}", "start_averaged=false", "lr=1e-12", *judged, "--output", str(place)]
    subprocess.run([*run, *words], cwd=ROOT, env=env, check=True, capture_output=True)
    again, apart = [*load(place / "checkpoints").net.parameters()], []
    for raw in (True, False):
        apart.append(max((a - b).abs().max().item() for a, b in zip(load(tmp_path / "checkpoints", raw=raw).net.parameters(), again)))
    assert 5 * apart[0] < apart[1] and apart[0] < 5e-4, "a training begins where the weights of its start are, here those of the last step"
    texts = [json.loads(line)["text"] for line in (place / "samples.jsonl").read_text().splitlines()]
    with open(place / "curve.csv", newline="") as file:
        said = [float(row["generative_perplexity"]) for row in csv.DictReader(file)]
    scores = generative_perplexity(texts, load(ROOT / "outputs/train/austen_ar/checkpoints"))
    assert said == [pytest.approx(scores.perplexity().mean, rel=1e-4)], "the judge's perplexity of the texts of a validation"
    wrong = subprocess.run([*run, judged[1], "--output", str(tmp_path / "other")], cwd=ROOT, env=env, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "judge: given" in wrong.stderr and "valid_samples 0" in wrong.stderr
    wrong = subprocess.run([*run, "method=sedd_absorb", "--output", str(tmp_path / "other")], cwd=ROOT, env=env, capture_output=True, text=True)
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and "T: given 8" in wrong.stderr and not (tmp_path / "other").exists()
