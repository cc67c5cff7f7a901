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


GROUPS = [
    ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK: given 1 and WORLD_SIZE 2 without torchrun; allowed: "),
    ({"WORLD_SIZE": "4"}, "RANK: given nothing and WORLD_SIZE 4 without torchrun; allowed: "),
    ({"SLURM_NTASKS": "4"}, "SLURM_NTASKS: given 4 without srun; allowed: "),
    ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}, "SLURM_NNODES: not set under srun, which sets it; allowed: "),
    ({"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "LOCAL_WORLD_SIZE: not set under torchrun, which sets it; allowed: "),
    ({"WORLD_SIZE": "²"}, "WORLD_SIZE: given ²; allowed: a number, as torchrun or srun gives it"),
]


@pytest.mark.parametrize("env, line", GROUPS, ids=[line.split(";")[0] for _, line in GROUPS])
def test_a_group_without_its_launcher_is_refused(root, capsys, monkeypatch, env, line):  # noqa: F811
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert refused(capsys, "toy/first")[0].startswith(line) and not (root / "outputs").exists()


def test_one_task_of_slurm_is_one_process(root, monkeypatch):  # noqa: F811
    for name, value in {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert runs.main(["toy/first", "steps=1"]) == 0


DAMAGE = {"cut": lambda text: text[: len(text) // 2], "empty": lambda text: "", "noise": lambda text: "\0\x1b[31m\udcff" * 9, "a list": lambda text: "[1]", "deep": lambda text: "[" * 9000}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["parameters.yaml", "environment.json", "metrics.json", "samples.jsonl", "curve.csv"])
def test_a_damaged_file_of_a_run_is_named_in_one_line_and_nothing_is_touched(root, capsys, name, how):  # noqa: F811
    folder = root / "outputs/toy/first"
    assert runs.main(["toy/first", "flag=true", "steps=1"]) == 0
    runs.Run(folder).samples([{"a": 1, "text": "b"}])
    runs.Run(folder).curve([{"step": 1, "valid_nll": 2.5}])
    (folder / name).write_bytes(DAMAGE[how]((folder / name).read_text()).encode("utf-8", "surrogateescape"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    status = runs.main(["toy/first", "flag=true", "steps=1"])
    lines = capsys.readouterr().err.splitlines()
    if status == 2:
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        assert len(lines) == 1 and lines[0].startswith("duo-run: outputs/toy/first") and lines[0].isprintable() and (name in lines[0] or how == "cut")
    else:  # what the run makes again, or what is a smaller file of its kind
        assert status == 0 and (name in ("environment.json", "curve.csv") or how == "empty")
        assert json.loads((folder / "environment.json").read_text())["sessions"][-1]["status"] == "finished"
        assert name != "environment.json" or any(f"{name}: not what a run writes, made again" in line for line in lines)
    assert runs.main(["collect", "toy/*"]) == 0, "one damaged run does not end the table of all"


def test_where_the_notebook_cannot_be_written_the_run_ends_in_one_line(root, capsys, monkeypatch):  # noqa: F811
    write = runs._write

    def full(path, content):
        if path.name == "notebook.ipynb":
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(runs, "_write", full)
    assert runs.main(["toy/first", "steps=1"]) == 1
    assert "notebook.ipynb: cannot be written (No space left on device)" in capsys.readouterr().err.splitlines()[-1]
    assert json.loads((root / "outputs/toy/first/environment.json").read_text())["sessions"][0]["status"] == "failed"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_folder_that_cannot_be_written_is_refused(root, capsys):  # noqa: F811
    (root / "outputs").mkdir(mode=0o500)
    assert refused(capsys, "toy/first") == ["outputs/toy/first: cannot be written (Permission denied); allowed: a folder of one's own"]


def test_a_newline_reaches_no_script(root, capsys):  # noqa: F811
    assert "a control character in its name" in refused(capsys, "toy/first", "--slurm", "--output", "x\nrm -r y")[0]
    assert refused(capsys, "toy/first", "--slurm", "comment=a\nrm -r y") == ["slurm: comment: given 'a\\nrm -r y'; allowed: one line without control characters"]


def test_paths_are_relative_to_where_one_stands(root, capsys, monkeypatch):  # noqa: F811
    (root / "there").mkdir()
    monkeypatch.chdir(root / "there")
    assert runs.main(["toy/first", "steps=1", "--output", "x"]) == 0 and (root / "there/x/metrics.json").exists()
    assert "-> x" in capsys.readouterr().err
    assert refused(capsys, "toy/first", "steps=0")[0].startswith("command line") and (root / "there/x").exists()
    assert runs.run("toy/first", steps=1, output="y").folder == root / "there/y"
    (root / "parameters/toy/first.yaml").write_text("a: 1\n")
    capsys.readouterr()
    assert refused(capsys, "toy/first")[0].startswith("../parameters/toy/first.yaml:1: a: unknown key")
