"""The door against accidents: whose files a run may touch, and what it makes of damaged ones."""
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from duo import runs
from duo.parameters import Job, check, plan, read_flat, read_parameters, read_yaml
from test_runs import COMMAND, REPOSITORY, notebook, refused, root  # noqa: F401

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
    runs._write(folder / "parameters.yaml", runs._flat({"steps": 1, "lr": 0.1, "kind": "good", "sizes": [1, 2], "label": None, "flag": True}, "duo-run toy/first flag=true steps=1"))
    runs._write(folder / "environment.json", json.dumps({"sessions": [{"status": "finished", "wall_seconds": 1.0}]}))
    runs._write(folder / "checkpoints/last.ckpt", "x")
    runs.Run(folder).metrics(loss=1.0)
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


def test_a_training_goes_on_to_more_steps_at_the_same_bits(tmp_path):
    from duo.data import Batches, documents, pack, tokenizer
    from duo.dit import DiTConfig
    from duo.schedules import LogLinear
    from duo.training import Training, fit

    text = pack([documents("austen", "valid")[0][:20_000]], tokenizer("char"), 32)

    def train(folder, steps):
        module = Training(DiTConfig(82, 16, 1, 2, 8, 0.1), "mdlm", vocab_size=81, schedule=LogLinear(), batch_size=4, max_steps=steps, lr=1e-2, warmup_steps=3, seed=3)
        fit(module, Batches(text, 4, 3), text[:4], tmp_path / folder, max_steps=steps, valid_every=4, checkpoint_every=4)
        return torch.load(tmp_path / folder / "checkpoints/last.ckpt", weights_only=True)

    train("a", 6)
    a, b = train("a", 13), train("b", 13)
    assert a["global_step"] == 13 and all(torch.equal(a["state_dict"][name], weight) for name, weight in b["state_dict"].items())
    moments = [w["optimizer_states"][0]["state"] for w in (a, b)]
    assert moments[0] and all(torch.equal(moments[0][i]["exp_avg_sq"], moments[1][i]["exp_avg_sq"]) for i in moments[0])


LONGER = [({"max_steps": 9}, None), ({"max_steps": 3}, r"max_steps \(4 there, 3 now\)"), ({"max_steps": 9, "lr": 1.0}, r"max_steps \(4 there, 9 now\), lr"),
          ({"lr_decay": "cosine"}, r"holds a training of 4 steps whose learning rate ends there \(lr_decay cosine\).*start=")]


@pytest.mark.parametrize("now, line", LONGER, ids=["longer", "shorter", "another rate", "cosine"])
def test_more_steps_are_no_other_training_where_the_rate_is_constant(tmp_path, now, line):
    params = {"max_steps": 4, "lr": 0.1, "lr_decay": now.get("lr_decay", "constant")}
    notebook(tmp_path / "nbs/run/toy.ipynb", 'output: str = "x"  # f\nmax_steps: int = 1  # s\nlr: float = 0.1  # r\nlr_decay: str = "constant"  # d\n')
    folder = tmp_path / "run"
    runs._write(folder / "parameters.yaml", runs._flat(params, "duo-run toy/first"))
    runs._write(folder / "checkpoints/last.ckpt", "x")
    job = Job("toy/first", tmp_path / "nbs/run/toy.ipynb", params | {"max_steps": 9} | now, folder, "", {})
    if line is None:
        assert runs._prepare(job, tmp_path, False)
    else:
        with pytest.raises(runs.RunError, match=line):
            runs._prepare(job, tmp_path, False)


def test_a_foreign_checkpoint_in_a_training_is_named_at_the_door(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").write_bytes(b"nothing")
    with pytest.raises(runs.RunError, match="checkpoints/last.ckpt: .*; --restart begins anew"):
        runs._check_readable(tmp_path, "train")


def test_a_checkpoint_is_sampled_where_its_training_text_is_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    shutil.copytree("outputs/train/austen_duo/checkpoints", tmp_path / "shared")
    path = tmp_path / "shared/config.json"
    path.write_text(path.read_text().replace('"data": "austen"', '"data": "gone.txt"'))
    run = runs.run("sample/austen_duo", output=tmp_path / "run", checkpoint=str(tmp_path / "shared"), n=1, steps=[1], judge=None, trajectory=False)
    assert len(run.samples()) == 1 and run.metrics()["real"] == {} and "not compared with gone.txt/valid: " in (run.folder / "notebook.ipynb").read_text()


@pytest.mark.parametrize("moment", [0.25, 0.5, 1.0, 1.5])
def test_a_signal_while_the_command_is_starting_has_its_word(root, moment):  # noqa: F811
    process = subprocess.Popen([*COMMAND, "toy/first", "kind=slow"], stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    try:
        while b"duo.runs" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            time.sleep(0.01)
        time.sleep(0.4 + moment)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 143 and err.strip().split("\n")[-1] == "duo-run: stopped by SIGTERM", err


def test_without_a_home_the_error_of_the_run_is_shown(root, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without HOME and without an entry in the system's list
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    assert runs.main(["toy/first", "kind=bad", "steps=1"]) == 1
    assert "failed in cell 3: ValueError: kind is bad" in capsys.readouterr().err.splitlines()[-1]


WRONG = [
    ("train/austen_duo", {"seed": 2**63}, "seed: given 9223372036854775808; allowed: 0 or more, below 2^63"),
    ("train/austen_duo", {"schedule_eps": 0.999999}, "schedule_eps: given 0.999999; allowed: above 0, up to 0.05"),
    ("train/austen_duo", {"length": 10**8}, "length: given 100000000; "),
    ("sample/austen_duo", {"guidance": []}, "guidance: given []; allowed: at least one value"),
    ("sample/austen_duo", {"labels": []}, "labels: given []; allowed: at least one value"),
    ("prepare/text8", {"splits": []}, "splits: given []; allowed: at least one value"),
    ("zero_shot/duo", {"data": [], "checkpoint": "outputs/train/austen_duo/checkpoints"}, "data: given []; allowed: at least one value"),
    ("sample/austen_duo", {"t_last": 1.0}, "t_last: given 1.0; allowed: above 0, below 1"),
    ("sample/austen_duo_rescale", {"kappa": 1, "eta": None, "hold": 0.9, "high_frac": 0.2, "middle_frac": 0.4}, "hold: given 0.9 with kappa 1"),
    ("sample/austen_duo", {"judge": "outputs/train/austen_mdlm/checkpoints"}, "judge: given outputs/train/austen_mdlm/checkpoints, a model of method mdlm; allowed: an autoregressive"),
    ("sample/austen_duo", {"judge": "outputs/train/sudoku6_ar/checkpoints"}, "judge: given outputs/train/sudoku6_ar/checkpoints, whose tokenizer sudoku6 lacks"),
    ("sample/austen_duo", {"length": 10**7}, "length: given 10000000, which takes 39,999,744 network calls one after the other for a text; allowed: up to 1,000,000"),
    ("sample/austen_duo", {"checkpoint": "outputs/train/sudoku6_duo/checkpoints", "judge": None}, "checkpoint: given outputs/train/sudoku6_duo/checkpoints, a model of puzzles"),
    ("harness/austen_cloze_duo", {"checkpoint": "outputs/train/sudoku6_duo/checkpoints"}, "checkpoint: given outputs/train/sudoku6_duo/checkpoints, a model of puzzles"),
    ("likelihood/austen_duo", {"draws": 1}, "draws: given 1 with a checkpoint of method duo; allowed: at least 2"),
    ("fid/twemoji_duo", {"n": 10**5}, "n: given 100000; allowed: up to the "),
    ("solve/sudoku6_duo", {"box_rows": 3, "box_columns": 2}, "box_rows: given 3 x 2 boxes, in which the first grid of outputs/puzzles/sudoku6/infill is none"),
    ("puzzles/sudoku6", {"box_rows": 2, "box_columns": 2}, "box_rows: given 2 x 2 cells in a box; allowed: from 5, below which no puzzle is hard"),
    ("puzzles/sudoku6", {"box_rows": 4, "box_columns": 4}, "box_rows: given 4 x 4 cells in a box; allowed: from 5"),
    ("bench/cpu", {"threads": 10**6}, "threads: given 1000000; allowed: from 1 to "),
]


@pytest.mark.parametrize("name, change, line", WRONG, ids=[f"{name}-{'-'.join(change)}" for name, change, _ in WRONG])
def test_what_cannot_be_is_refused_before_a_kernel_starts(name, change, line):
    verb = name.split("/")[0]
    values, _ = read_yaml(REPOSITORY / f"parameters/{name}.yaml", read_parameters(REPOSITORY / f"nbs/run/{verb}.ipynb"), REPOSITORY)
    assert [problem for problem in check(verb, values, REPOSITORY) if "which is not there" not in problem] == []
    problem, = check(verb, values | change, REPOSITORY)
    assert problem.startswith(line)


def test_a_prompt_is_one_text_as_it_is_typed(tmp_path, capsys):
    source = 'output: str = "x"  # folder\nprompt: str | None = None  # text\ndata: str = "a"  # a name\n'
    notebook(tmp_path / "nbs/run/ask.ipynb", source)
    (tmp_path / "parameters/ask").mkdir(parents=True)
    (tmp_path / "parameters/ask/one.yaml").write_text('prompt: null\ndata: a\n')
    (tmp_path / "parameters/ask/two.yaml").write_text('prompt: ["a, b", "a? b"]\ndata: a\n')
    for text in ('"Well", he said, "no"', "a\nb", "{{x}} {}", "null hypothesis", '"'):
        job, = plan("ask/one", [f"prompt={text}"], root=tmp_path)
        assert job.params["prompt"] == text and plan("ask/one", shlex.split(job.command)[2:], root=tmp_path)[0].params == job.params
        assert read_flat_text(tmp_path, runs._flat(job.params, job.command)) == job.params
    assert [job.params["data"] for job in plan("ask/one", ['data="a,b",c'], root=tmp_path)] == ["a,b", "c"]
    jobs = plan("ask/two", [], root=tmp_path)
    assert [job.params["prompt"] for job in jobs] == ["a, b", "a? b"] and len({job.folder for job in jobs}) == 2


def read_flat_text(folder, text):
    (folder / "text.yaml").write_text(text)
    return read_flat(folder / "text.yaml")


def test_typed_paths_become_paths_from_the_root(root, monkeypatch):  # noqa: F811
    source = 'output: str = "x"  # folder\ndata: str = "a"  # a name\n'
    notebook(root / "nbs/run/ask.ipynb", source)
    (root / "parameters/ask").mkdir()
    (root / "parameters/ask/one.yaml").write_text("data: a\n")
    for name in ("sub/x.txt", "x.txt", "y.txt", "sub/austen"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("")
    asked = lambda text: plan("ask/one", [f"data={text}"])[0].params["data"]
    assert asked("x.txt") == "x.txt" and asked("austen") == "austen"
    monkeypatch.chdir(root / "sub")
    assert asked("x.txt") == "sub/x.txt" and asked("../x.txt") == "x.txt" and asked("austen") == "austen" and asked("owner/name") == "owner/name"
    with pytest.raises(runs.RunError, match=r"^command line: data: given y.txt, which is not here; allowed: \.\./y.txt$"):
        asked("y.txt")
