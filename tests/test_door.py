"""The door against accidents: whose files a run may touch, and what it makes of damaged ones."""
import json
import os

import pytest

from duo import runs
from test_runs import everything, refused, root  # noqa: F401

OWN = {"notebook.ipynb": "{}", "metrics.json": "{}", "curve.csv": "a,b\n", "samples.jsonl": "{}\n", "environment.json": "{}", "figures/mine.png": "x", "checkpoints/mine.ckpt": "x",
       "checkpoints/last.ckpt": "x", "slurm.out": "x", "logs/mine.log": "x", ".earlier/metrics.json": "{}", "parameters.yaml": "a: 1\n", "lr=1/x": "x", "sweep.json": "[]"}


def texts(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("more", [[], ["--restart"]], ids=["", "restart"])
def test_a_folder_of_others_is_refused_and_stays_as_it_is(root, capsys, name, more):  # noqa: F811
    (root / "x" / name).parent.mkdir(parents=True)
    (root / "x" / name).write_text(OWN[name])
    line, = refused(capsys, "toy/first", "--output", "x", *more)
    assert line.startswith("x") and "choose another --output" in line and "restart" not in line
    assert texts(root / "x") == {name: OWN[name]}


def test_a_restart_touches_only_what_the_run_recorded(root, capsys):  # noqa: F811
    assert runs.main(["toy/first", "flag=true", "steps=1"]) == 0
    folder, mine = root / "outputs/toy/first", {"checkpoints/step1.ckpt": "mine", "figures/mine.png": "mine", "notes.txt": "mine"}
    for name, text in mine.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    assert runs.main(["toy/first", "flag=true", "steps=2", "--restart"]) == 0
    assert runs.Run(folder).metrics()["resumed"] == 1, "the checkpoint of somebody else, not last.ckpt"
    assert texts(folder).items() >= mine.items()
    (folder / "samples.jsonl").write_text("mine")
    capsys.readouterr()
    assert refused(capsys, "toy/first", "--restart")[0].startswith("outputs/toy/first: holds samples.jsonl, which the run there did not write; move it away")
    assert (folder / "samples.jsonl").read_text() == "mine"


@pytest.mark.parametrize("words, name", [(["toy/first", "steps=1,2"], "sweep.csv"), (["collect", "toy/*"], "runs.csv"), (["collect", "toy/*"], "figures/curves.png")])
def test_a_table_of_others_is_not_replaced(root, capsys, words, name):  # noqa: F811
    assert runs.main(["toy/first", "steps=1"]) == 0
    (root / "x" / name).parent.mkdir(parents=True)
    (root / "x" / name).write_text("mine\n")
    capsys.readouterr()
    assert refused(capsys, *words, "--output", "x")[-1] == f"x/{name}: not written by duo-run; move it away or choose another --output"
    assert texts(root / "x") == {name: "mine\n"}
