"""What a GPU needs, tested without one."""
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def cells(name):
    """The sources of a run notebook's code cells, the parameters first."""
    found = [c for c in json.loads((ROOT / f"nbs/run/{name}.ipynb").read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    return ["".join(c["source"]) for c in sorted(found, key=lambda c: "parameters" not in c["metadata"].get("tags", ()))]


class Reached(Exception):
    """The last training of the notebook would begin here."""


@pytest.mark.parametrize("name, trainings", [("train", 1), ("distil", 2)])
def test_nothing_initialises_cuda_before_the_last_fit(name, trainings, monkeypatch, tmp_path):
    """A process that ddp_notebook forks cannot use CUDA once its parent has initialised it."""
    import torch

    import duo.training

    calls = []

    def initialised(*_):
        raise AssertionError("CUDA was initialised")

    def fit(module, *_, **__):
        calls.append(module)
        if len(calls) == trainings:
            raise Reached
        return {"valid_nll": 1.0, "tokens": 1, "steps": 1, "seconds": 1.0}

    monkeypatch.setattr(torch.cuda, "_lazy_init", initialised)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(duo.training, "fit", fit)
    monkeypatch.chdir(ROOT)
    first, *others = cells(name)
    space = {}
    exec(first, space)
    space["output"] = str(tmp_path)
    with pytest.raises(Reached):
        for cell in others:
            exec(cell, space)
    assert len(calls) == trainings and not any(p.is_cuda for p in calls[-1].parameters())


BUDGET = {  # launches outside of the network, waits of the host; a loss may have 120, a curriculum 60, the KL of distillation 160, a sampling step 80
    "train/owt_duo": (182, 0),  # dense: the noise of each of 32 rows is a launch of its own
    "train/owt_duopp": (180, 0), "train/owt_mdlm": (120, 0), "train/owt_ar": (120, 0),
    "distil/owt_duo": (190, 0),  # with the path of the pair
    "sample/owt_duo batch_size=16": (80, 1), "sample/owt_mdlm batch_size=16": (80, 2),  # the cache asks whether a text has changed
    "likelihood/owt_duo": (120, 1),
}


def test_what_the_papers_runs_ask_of_a_gpu():
    """One GPU of 80 GB holds each run, and no change makes the host slower than the device."""
    pytest.importorskip("triton", reason="the kernels need Triton, without which their parts are counted one by one")
    rehearsal = pytest.importorskip("duo.rehearsal", reason="this torch has no fake device")
    for (name, (launches, waits)), row in zip(BUDGET.items(), rehearsal.rehearsed(BUDGET, ROOT), strict=True):
        assert row["file"] == name.split()[0] and row["peak_gib"] < 72 and row["mixed_devices"] == 0, row
        assert row["launches_outside"] <= launches and row["host_syncs"] <= waits, row
