"""Images from training to sheets, and what is refused on the way."""
import hashlib
import json
import os
import pickle
import sys

import numpy as np
import pytest

from duo.images import images
from duo.parameters import RunError, plan
from duo.runs import run

TINY = dict(data="twemoji", length=48, hidden_size=8, n_blocks=1, ch_mult=[1, 2], cond_dim=8, batch_size=4, device_batch_size=2, max_steps=4, curriculum_steps=2,
            warmup_steps=1, valid_every=2, valid_blocks=4, checkpoint_every=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a U-Net with classes, trained for four steps by the curriculum and the bound."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = tmp_path_factory.mktemp("train")
    run("train/twemoji_duo", output=folder, **TINY)
    return folder


def test_train_sample_measure_distil(trained, tmp_path):
    config = json.loads((trained / "checkpoints/config.json").read_text())
    assert config["network"] == "unet" and config["num_classes"] == 10 and len(config["training"]["classes"]) == 10
    checkpoint = str(trained / "checkpoints")
    run("sample/twemoji_duo", output=tmp_path / "sample", checkpoint=checkpoint, n=4, steps=[2], labels=[1, 9], guidance=[1.0, 2.0], trajectory=True)
    sheets = [f"{kind}steps=2,guidance={weight}.png" for kind in ("", "trajectory,") for weight in (1, 2)]
    assert sorted(p.name for p in (tmp_path / "sample/figures").iterdir()) == ["real.png", *sheets]
    sampled = json.loads((tmp_path / "sample/metrics.json").read_text())
    assert [(row["guidance"], row["calls"]) for row in sampled["rows"]] == [(1, 2), (2, 4)] and all(0 <= row["class_share"] <= 1 for row in (*sampled["rows"], sampled["real"]))
    run("likelihood/twemoji_duo", output=tmp_path / "likelihood", checkpoint=checkpoint, blocks=4, draws=2)
    found = json.loads((tmp_path / "likelihood/metrics.json").read_text())
    assert found["bits_per_dimension"] > 0 and found["bits_per_dimension_se"] > 0 and found["tokens"] == 4 * 48
    run("distil/twemoji_duo", output=tmp_path / "distil", checkpoint=checkpoint, n=2, sample_steps=[2], rounds=1, steps_per_round=2, batch_size=2, warmup_steps=1, valid_every=2,
        valid_blocks=2, checkpoint_every=2)
    assert json.loads((tmp_path / "distil/metrics.json").read_text())["rounds"] == 1


@pytest.mark.parametrize("target, change, message", [
    ("train/twemoji_duo", dict(data="austen"), "backbone: given unet with data austen"),
    ("train/twemoji_duo", dict(tokenizer="char"), "tokenizer: given char with data twemoji; allowed: pixels"),
    ("train/twemoji_duo", dict(length=100), "length: given 100 with data twemoji; allowed: 3, 12, 48, 192, 768, 3072"),
    ("train/twemoji_duo", dict(method="mdlm"), "curriculum: given top-k with method mdlm"),
    ("train/twemoji_duo", dict(method="ar", curriculum="none"), "method: given ar with backbone unet"),
    ("train/twemoji_duo", dict(backbone="dit"), "label_dropout: given 0.1 with backbone dit; allowed: null"),
    ("train/twemoji_duo", dict(top_k=300), "top_k: given 300; allowed: up to the 256 values of a pixel"),
    ("train/twemoji_duo", dict(label_dropout=1.0), "label_dropout: given 1.0; allowed: 0 or more, below 1"),
    ("sample/twemoji_duo", dict(labels=None), "guidance: given [1.0, 2.5] without labels"),
    ("sample/twemoji_duo", dict(labels=[10]), "labels: given [10]; allowed: null, or classes from 0 to 9"),
    ("sample/austen_duo", dict(labels=[0]), "labels: given [0]; allowed: null, the model has no labels"),
    ("sample/austen_duo", dict(guidance=[2.0]), "guidance: given [2.0] without labels"),
    ("likelihood/austen_duo", dict(data="twemoji"), "data: given twemoji with a checkpoint of text"),
    ("distil/twemoji_duo", dict(data="austen"), "data: given austen with a checkpoint of images")])
def test_refused_before_anything_starts(trained, target, change, message):
    if "twemoji" in target and not target.startswith("train/"):
        change = {"checkpoint": str(trained / "checkpoints")} | change
    with pytest.raises(RunError) as error:
        plan(target, change)
    assert any(message in problem for problem in error.value.problems), error.value.problems


def test_cifar10_in_its_own_format(tmp_path, monkeypatch):
    """Files of the published format, ten images each; torchvision reads them when their sums are the ones that it knows."""
    try:
        from torchvision import datasets
    except Exception as error:  # not there, or built for another torch
        pytest.skip(f"torchvision: {error}")
    folder, rng, sums = tmp_path / "cifar-10-batches-py", np.random.default_rng(0), {}
    folder.mkdir()
    parts = {name: rng.integers(256, size=(10, 3072), dtype=np.uint8) for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]}
    contents = {name: {"data": part, "labels": list(range(10))} for name, part in parts.items()} | {"batches.meta": {"label_names": [f"class {i}" for i in range(10)]}}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[n, sums[n]] for n in parts if n != "test_batch"])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]})
    monkeypatch.setenv("DUO_CACHE", str(tmp_path))
    train, valid = (images("cifar10", split) for split in ("train", "valid"))
    assert len(train) == 50 and len(valid) == 10 and train.labels.tolist() == list(range(10)) * 5 and train.classes[3] == "class 3"
    assert train[12].tolist() == parts["data_batch_2"][2].tolist()  # the files too are channels first
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", "0" * 32]])
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/none.tar.gz")
    with pytest.raises(ValueError, match="data cifar10 could not be fetched"):
        images("cifar10", "test")


def test_cifar10_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ValueError, match="needs torchvision"):
        images("cifar10")
