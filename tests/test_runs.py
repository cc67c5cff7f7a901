"""The door to the runs: what it refuses, what it leaves behind, and how it ends."""
import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from duo import runs

REPOSITORY = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-c", "import sys; from duo.runs import main; sys.exit(main())"]

TOY = """from typing import Literal

output: str = "outputs/toy/first"  # folder of this run
steps: int = 20  # steps, at least 1
lr: float = 0.1  # learning rate
kind: Literal["good", "bad", "dead", "slow"] = "good"  # what is to happen
sizes: list[int] = [1, 2]  # sizes to go through
label: str | None = None  # a name
flag: bool = False  # a switch
"""
WORK = """import os, sys, time
from pathlib import Path
from tqdm import tqdm
from duo.runs import Run
run = Run(output)
before = sorted(p.name for p in run.checkpoints.glob("*"))
run.checkpoints.mkdir(parents=True, exist_ok=True) if flag else None
Path(output, "pid.tmp").write_text(str(os.getpid())) if kind == "slow" else None
for i in tqdm(range(steps), mininterval=0):
    time.sleep(1 if kind == "slow" else 0.002)
print("root", os.getcwd(), file=sys.stderr)
if kind == "bad":
    raise ValueError(f"kind is bad in {os.getcwd()}")
if kind == "dead":
    os.kill(os.getpid(), 9)
if flag:
    (run.checkpoints / "last.ckpt").write_text("x")
results = run.metrics(loss=lr * steps, resumed=len(before), executable=Path(sys.executable).name)
"""
NESTED = """output: str = "outputs/nested/first"  # folder
kind: str = "good"  # of the inner run
"""
INNER = """from duo.runs import Run, run
inner = run("toy/first", output=f"{output}/inner", kind=kind, steps=30)
Run(output).metrics(**inner.metrics())
"""
FIRST = "# The first\nsteps: 20\nlr: 0.1\nkind: good\nsizes: [1, 2]\nlabel: null\nflag: false\n"


def notebook(path, parameters, *cells):
    made = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}), *map(nbformat.v4.new_code_cell, cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with the runs toy/first and nested/first, and the current directory in it."""
    root = tmp_path.resolve()
    notebook(root / "nbs/run/toy.ipynb", TOY, WORK)
    notebook(root / "nbs/run/nested.ipynb", NESTED, INNER)
    for verb, text in (("toy", FIRST), ("nested", "# One in another\nkind: good\n")):
        (root / "parameters" / verb).mkdir(parents=True)
        (root / "parameters" / verb / "first.yaml").write_text(text)
    monkeypatch.chdir(root)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("DUO_OUTPUTS", "RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return root


def everything(root):
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*"))


def refused(capsys, *words):
    """The lines of a command that must end with status 2."""
    assert runs.main(list(words)) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert all(line.startswith("duo-run: ") for line in lines), lines
    return [line.removeprefix("duo-run: ") for line in lines]


LINES = [
    ("steps: 20", "steps: true", "parameters/toy/first.yaml:2: steps: given true; a bool is not a number; allowed: int"),
    ("steps: 20", "steps: 20.0", "parameters/toy/first.yaml:2: steps: given 20.0, which YAML reads as a float; write 20; allowed: int"),
    ("steps: 20", "steps: 1e3", "parameters/toy/first.yaml:2: steps: given 1e3, which YAML reads as a string; write 1000; allowed: int"),
    ("steps: 20", "steps: 0", "parameters/toy/first.yaml: steps: given 0; allowed: at least 1"),
    ("steps: 20", "steps:", "parameters/toy/first.yaml:2: steps: given nothing; allowed: int"),
    ("lr: 0.1", "lr: 3e-4", "parameters/toy/first.yaml:3: lr: given 3e-4, which YAML reads as a string; write 3.0e-4; allowed: float"),
    ("lr: 0.1", "lr: 1e6", "parameters/toy/first.yaml:3: lr: given 1e6, which YAML reads as a string; write 1.0e+6; allowed: float"),
    ("lr: 0.1", "lr: .nan", "parameters/toy/first.yaml:3: lr: given .nan; allowed: float"),
    ("lr: 0.1\n", "", "parameters/toy/first.yaml: lr: missing; allowed: float (learning rate)"),
    ("lr: 0.1", "lr: {a: 1}", "parameters/toy/first.yaml:3: lr: given nested keys; allowed: float"),
    ("kind: good", "kind: god", "parameters/toy/first.yaml:4: kind: given god; allowed: one of good, bad, dead, slow"),
    ("sizes: [1, 2]", "sizes: [1, 2.5]", "parameters/toy/first.yaml:5: sizes: given [1, 2.5]; allowed: list[int]"),
    ("label: null", "label: no", 'parameters/toy/first.yaml:6: label: given no, which YAML reads as a bool; write "no"; allowed: str or null'),
    ("flag: false", "flag: 0", "parameters/toy/first.yaml:7: flag: given 0; allowed: true or false"),
    ("flag: false", "flag: false\nflag: true", "parameters/toy/first.yaml:8: flag: given twice; allowed: each key once"),
    ("flag: false", "flag: false\nflg: true", "parameters/toy/first.yaml:8: flg: unknown key; did you mean flag?"),
    ("flag: false", "flag: false\nzzz: 1", "parameters/toy/first.yaml:8: zzz: unknown key; allowed: steps, lr, kind, sizes, label, flag"),
    ("flag: false", "flag: false\noutput: x", "parameters/toy/first.yaml:8: output: given x; the door fills it in: choose the folder with --output"),
    ("flag: false", "flag: [", "parameters/toy/first.yaml:8: not YAML: expected the node content, but found '<stream end>'"),
    (FIRST, "- 1\n", "parameters/toy/first.yaml: a sequence at the top; allowed: lines `key: value`"),
]


@pytest.mark.parametrize("old, new, line", LINES, ids=[new.strip() or "missing" for _, new, _ in LINES])
def test_a_wrong_file_is_refused_in_one_line(root, capsys, old, new, line):
    path = root / "parameters/toy/first.yaml"
    path.write_text(FIRST.replace(old, new))
    before = everything(root)
    assert refused(capsys, "toy/first") == [line]
    assert everything(root) == before


COMMANDS = [
    (["toy/frist"], "toy/frist: no such run; there is toy/first"),
    (["tyo/first"], "tyo/first: no nbs/run/tyo.ipynb; the verbs are nested, toy; there is toy/first; duo-run --list shows all 2"),
    (["toy"], "toy: no such run; there is toy/first"),
    (["collect"], "collect: no run in nothing; allowed: folders of runs, as in duo-run collect 'train/*'"),
    (["collect", "toy/*"], "collect: no run in toy/*; allowed: folders of runs, as in duo-run collect 'train/*'"),
    (["toy/first", "lr=high"], "command line: lr: given high; allowed: float"),
    (["toy/first", "steps=1.5"], "command line: steps: given 1.5; allowed: int"),
    (["toy/first", "steps=1,0"], "command line: steps: given 0; allowed: at least 1"),
    (["toy/first", "steps=1,1"], "command line: steps: given 1,1; allowed: each value once"),
    (["toy/first", "lr=0.001,1e-3"], "command line: lr: given 0.001,1e-3; allowed: each value once"),
    (["toy/first", "learning_rate=1"], "command line: learning_rate=1: unknown key; did you mean lr?"),
    (["toy/first", "LR=1"], "command line: LR=1: unknown key; did you mean lr?"),
    (["--list", "zzz"], "--list zzz: nothing has this in its name; duo-run --list shows all 2"),
    (["toy/first", "stesp=1"], "command line: stesp=1: unknown key; did you mean steps?"),
    (["toy/first", "steps"], "command line: steps: allowed: key=value"),
    (["toy/first", "steps=1", "steps=2"], "command line: steps=2: steps is given twice; allowed: each key once"),
    (["toy/first", "kind=worse"], "command line: kind: given worse; allowed: one of good, bad, dead, slow"),
    (["toy/first", "flag=yes"], "command line: flag: given yes; allowed: true or false"),
    (["toy/first", "output=x"], "command line: output=x: choose the folder with --output DIR"),
    (["toy/first", "--fast"], "command line: --fast; allowed: --output DIR, --restart, --dry-run, --smoke, --slurm, --list, --help"),
    (["toy/first", "--output"], "command line: --output: given nothing; allowed: a folder, as in --output DIR"),
    (["toy/first", "--output", ""], "command line: --output: given nothing; allowed: a folder, as in --output DIR"),
    (["toy/first", "--output", "nbs/run/toy.ipynb/x"], "nbs/run/toy.ipynb: a file; allowed: a folder, or a name that does not exist yet"),
    (["--dry-run"], "command line: no VERB/NAME; allowed: duo-run VERB/NAME [key=value ...], and duo-run --list shows what can be run"),
    (["toy/first", "--slurm", "lr=1e-3"], "command line: lr=1e-3: lr is a parameter of the run; put it before --slurm"),
    (["toy/first", "--slurm", "node=2"], "command line: node=2: no option of sbatch; did you mean nodes?"),
    (["toy/first", "setps=1", "--help"], "command line: setps=1: unknown key; did you mean steps?"),
    (["collect", "nbs", "--dry-run"], "command line: --dry-run with collect; allowed: --output DIR, --help"),
    (["toy/first", "--output", "nbs"], "nbs: holds run and is not the folder of a run; choose another --output"),
]


@pytest.mark.parametrize("words, line", COMMANDS, ids=[" ".join(w) for w, _ in COMMANDS])
def test_a_wrong_command_is_refused_in_one_line(root, capsys, words, line):
    before = everything(root)
    assert refused(capsys, *words) == [line]
    assert everything(root) == before


@pytest.mark.parametrize("name, value, words, line", [
    ("DUO_OUTPUTS", "nbs/run/toy.ipynb", [], "nbs/run/toy.ipynb: a file; allowed: a folder, or a name that does not exist yet"),
    ("DUO_OUTPUTS", "", ["steps=0"], "command line: steps: given 0; allowed: at least 1"),
    ("RANK", "a", [], "RANK: given a; allowed: a number, as torchrun or srun gives it"),
    ("TORCHELASTIC_RUN_ID", "1", ["lr=1,2"], "command line: a sweep under torchrun; allowed: one run, or --slurm, which makes an array of the sweep"),
])
def test_a_wrong_environment_is_refused_in_one_line(root, capsys, monkeypatch, name, value, words, line):
    monkeypatch.setenv(name, value)
    for more in ([], ["--dry-run"]):
        assert refused(capsys, "toy/first", *words, *more) == [line]


def test_all_problems_are_listed_at_once(root, capsys):
    (root / "parameters/toy/first.yaml").write_text(FIRST.replace("20", "x").replace("good", "worse"))
    lines = refused(capsys, "toy/first", "lr=high")
    assert [line.split(":")[-3 if "yaml" in line else 1].strip() for line in lines] == ["steps", "kind", "lr"]


def test_outside_of_a_repository(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.duo, "__file__", str(tmp_path / "site/duo/__init__.py"))
    assert refused(capsys, "toy/first") == ["no folder with parameters/ and nbs/run/ here or above: change into a clone of duo's repository"]


@pytest.mark.parametrize("cells, words", [
    ([], "0 cells are tagged `parameters`; allowed: exactly one"),
    ([TOY, TOY], "2 cells are tagged `parameters`; allowed: exactly one"),
    (["steps: int = 1"], "the parameters cell has no `output: str`, the folder of the run"),
    (["output: str = ''\nsteps = 1"], "line 2 of the parameters cell; allowed: `name: type = value  # meaning`"),
    (["output: str = ''\nsteps: int = 1.5"], "steps: given 1.5; allowed: int"),
    (["output: str = ''\nsteps: dict = {}"], "steps: given {}; annotation dict; allowed: int, float, bool, str, list[int], list[float], list[str], "
                                             "Literal[...] and `| None`"),
])
def test_a_wrong_parameters_cell_is_refused(root, capsys, cells, words):
    made = [nbformat.v4.new_code_cell(c, metadata={"tags": ["parameters"]}) for c in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=made), root / "nbs/run/toy.ipynb")
    assert refused(capsys, "toy/first") == [f"nbs/run/toy.ipynb: {words}"]


def test_help_and_list(root, capsys):
    assert runs.main(["--list"]) == runs.main(["toy/first", "--help"]) == runs.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert runs.main(["--list", "nes*/*"]) == runs.main(["collect", "--help"]) == 0
    listed, _, help = capsys.readouterr().out.partition("\n")
    assert listed == "nested/first  One in another" and help.startswith("duo-run collect FOLDER")
    assert "toy/first     The first" in out and "steps, at least 1" in out and 'Literal["good", "bad", "dead", "slow"]' in out


def test_a_run_leaves_its_folder_and_no_path_of_the_machine(root, capsys, monkeypatch):
    monkeypatch.chdir(root / "nbs")
    monkeypatch.setenv("JUPYTER_PATH", str(root / "no-kernels"))
    assert runs.main(["toy/first", "lr=3e-1"]) == 0
    seen = capsys.readouterr()
    folder = root / "outputs/toy/first"
    assert everything(folder) == ["environment.json", "metrics.json", "notebook.ipynb", "parameters.yaml"]
    assert runs.Run(folder).metrics() == {"loss": 6.0, "resumed": 0, "executable": Path(sys.executable).name}
    assert runs.Run(folder).parameters == {"steps": 20, "lr": 0.3, "kind": "good", "sizes": [1, 2], "label": None, "flag": False}
    environment = json.loads((folder / "environment.json").read_text())
    (session,) = environment["sessions"]
    assert session["status"] == "finished" and session["start"].endswith("+00:00") and session["wall_seconds"] > 0 and session["peak_memory_gb"] > 0
    assert {"python", "torch", "duo-diffusion"} <= environment["versions"].keys() and environment["command"] == "duo-run toy/first lr=3e-1"
    for path in folder.iterdir():
        assert str(root) not in path.read_text() and str(REPOSITORY) not in path.read_text(), path
    stored = nbformat.read(folder / "notebook.ipynb", 4)
    assert stored.metadata.papermill.output_path == "outputs/toy/first/notebook.ipynb"
    assert "10/20" in seen.err and "\r" in seen.err and f"root {root}" in seen.err, "the terminal sees all of the bar, as it is"
    texts = [o.text for c in stored.cells for o in c.get("outputs", [])]
    assert len(texts) == 1 and "20/20" in texts[0] and "10/20" not in texts[0] and "root ." in texts[0]
    assert "Kernel is running" not in seen.err and "frozen" not in seen.err


def test_a_failure_is_one_line_and_keeps_the_notebook(root, capsys):
    assert runs.main(["toy/first", "kind=bad"]) == 1
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert line == f"duo-run: toy/first failed in cell 3: ValueError: kind is bad in {root}; see outputs/toy/first/notebook.ipynb"
    text = (root / "outputs/toy/first/notebook.ipynb").read_text()
    assert "kind is bad in ." in text and str(root) not in text
    assert json.loads((root / "outputs/toy/first/environment.json").read_text())["sessions"][0]["status"] == "failed"


def test_a_kernel_that_dies(root, capsys):
    assert runs.main(["toy/first", "kind=dead", "steps=1"]) == 1
    assert "toy/first failed in cell 3: the kernel died: " in capsys.readouterr().err.strip().split("\n")[-1]
    assert everything(root / "outputs/toy/first") == ["environment.json", "notebook.ipynb", "parameters.yaml"]


def test_a_sweep_goes_on_behind_a_failure(root, capsys):
    assert runs.main(["toy/first", "kind=bad,good", "steps=2", "--output", "swept"]) == 1
    table = capsys.readouterr().out.strip().split("\n")[-3:]
    assert table[0].split()[:3] == ["kind", "status", "loss"] and table[1].split() == ["bad", "failed"] and table[2].split()[:3] == ["good", "finished", "0.2"]
    rows = json.loads((root / "swept/sweep.json").read_text())
    assert rows[1]["loss"] == 0.2 and [r["status"] for r in rows] == ["failed", "finished"]
    assert len(list(csv.DictReader((root / "swept/sweep.csv").open()))) == 2 and runs.Run("swept/kind=good").metrics()["loss"] == 0.2


def test_checkpoints_are_kept_for_the_same_parameters_alone(root, capsys):
    folder = root / "outputs/toy/first"
    assert runs.main(["toy/first", "flag=true"]) == 0 and runs.Run(folder).metrics()["resumed"] == 0
    (folder / "curve.csv").write_text("step\n1\n")
    assert runs.main(["toy/first", "flag=true"]) == 0 and runs.Run(folder).metrics()["resumed"] == 1
    assert (folder / "curve.csv").exists() and len(json.loads((folder / "environment.json").read_text())["sessions"]) == 2
    capsys.readouterr()
    before = {p: p.read_text() for p in folder.rglob("*.*")}
    assert refused(capsys, "toy/first", "flag=true", "lr=0.2") == [
        "outputs/toy/first: holds checkpoints of other parameters: lr (0.1 there, 0.2 now); --restart discards them, --output DIR keeps both"]
    assert {p: p.read_text() for p in folder.rglob("*.*")} == before
    with pytest.raises(runs.RunError, match="holds checkpoints"):
        runs.run("toy/first", flag=True, lr=0.2)
    notebook(root / "nbs/run/toy.ipynb", TOY + "extra: int | None = None  # came later\n", WORK)
    (root / "parameters/toy/first.yaml").write_text(FIRST + "extra: null\n")
    assert runs.main(["toy/first", "flag=true"]) == 0 and runs.Run(folder).metrics()["resumed"] == 1 and "extra" in runs.Run(folder).parameters
    (folder / "parameters.yaml").write_text((folder / "parameters.yaml").read_text().replace("extra: null\n", ""))
    capsys.readouterr()
    assert refused(capsys, "toy/first", "flag=true", "extra=3") == [
        "outputs/toy/first: holds checkpoints of other parameters: extra (not given there, 3 now); --restart discards them, --output DIR keeps both"]
    (folder / "notes.txt").write_text("mine")
    assert runs.main(["toy/first", "flag=true", "lr=0.2", "--restart"]) == 0 and runs.Run(folder).metrics()["resumed"] == 0
    assert (folder / "notes.txt").exists() and not (folder / "curve.csv").exists()


def test_a_run_that_fails_leaves_the_earlier_results(root, capsys):
    folder, hidden = root / "outputs/toy/first", root / "outputs/toy/first/.earlier"
    assert runs.main(["toy/first"]) == 0
    before = {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}
    for kind in ("bad", "dead"):
        capsys.readouterr()
        assert runs.main(["toy/first", f"kind={kind}"]) == 1
        assert capsys.readouterr().err.splitlines()[-1].endswith("see outputs/toy/first/failed.ipynb, beside the earlier results")
        after = {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}
        assert "kind" in after.pop("failed.ipynb") and after == before and not hidden.exists()
    assert runs.main(["toy/first", "lr=0.2"]) == 0
    assert runs.Run(folder).metrics()["loss"] == 4.0 and not (folder / "failed.ipynb").exists() and not hidden.exists()


def test_one_run_at_a_time_in_a_folder(root):
    (root / "outputs/toy/first").mkdir(parents=True)
    with runs._alone(root / "outputs/toy/first", root), pytest.raises(runs.RunError, match="another run is writing there"):
        runs.run("toy/first")


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run = runs.Run(tmp_path / "run")
    run.metrics(loss=1.0)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        run.metrics(loss=2.0)
    with pytest.raises(OSError, match="full"):
        run.samples(["a"])
    assert run.metrics() == {"loss": 1.0} and everything(tmp_path) == ["run", "run/metrics.json"]


def test_only_the_first_process_of_a_group_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = runs.Run(tmp_path / "run")
    assert run.metrics(loss=1.0) == {"loss": 1.0} and run.curve([{"a": 1}]) and run.samples(["a"]) and everything(tmp_path) == []


def kernel_of(folder, process, patience=30):
    """The process id that the toy left, once it is at work."""
    end = time.time() + patience
    while time.time() < end and process.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            return int((folder / "pid.tmp").read_text())
        time.sleep(0.05)
    raise AssertionError(process.communicate())


def gone(pid, patience=10):
    """Whether the process ends in time; one that ended and is not yet waited for counts as gone."""
    end = time.time() + patience
    while time.time() < end:
        status = Path(f"/proc/{pid}/stat")
        try:
            os.kill(pid, 0)
            if status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("target, folder, number, status", [
    ("toy/first", "outputs/toy/first", signal.SIGINT, 130),
    ("nested/first", "outputs/nested/first/inner", signal.SIGTERM, 143),
    ("nested/first", "outputs/nested/first/inner", signal.SIGKILL, -9),
])
def test_no_kernel_outlives_its_run(root, target, folder, number, status):
    process = subprocess.Popen([*COMMAND, target, "kind=slow"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # as in a terminal: a background shell ignores it
    try:
        pid = kernel_of(root / folder, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == status and gone(pid), err
    if status > 0:
        assert err.strip().split("\n")[-1] == f"duo-run: stopped by {number.name}" and "Traceback" not in err
        assert "KeyboardInterrupt" in (root / folder / "notebook.ipynb").read_text()
        assert json.loads((root / folder / "environment.json").read_text())["sessions"][0]["status"] == "stopped"


def test_a_run_inside_of_a_run(root, capsys):
    assert runs.main(["nested/first"]) == 0
    assert "15/30" in capsys.readouterr().err, "the inner bar reaches the terminal"
    assert runs.Run("outputs/nested/first").metrics() == runs.Run("outputs/nested/first/inner").metrics() != {}
    assert "15/30" not in (root / "outputs/nested/first/notebook.ipynb").read_text()
