"""The parameters of this repository: every run notebook declares them, every file of parameters/ fits its notebook."""
from pathlib import Path

import nbformat
import pytest

from duo.parameters import RunError, check, plan, read_parameters, read_yaml

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPOSITORY / "nbs/run").glob("*.ipynb"))
FILES = sorted((REPOSITORY / "parameters").glob("*/*.yaml"))


def test_parameters_are_read_without_executing(tmp_path):
    source = "import nothing_of_this_name\noutput: str = ''  # the # folder\nx: float | None = -1e-3  # in s\ny: int = 2\n"
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "toy.ipynb")
    found = read_parameters(tmp_path / "toy.ipynb")
    assert [(p.default, p.meaning) for p in found.values()] == [("", "the # folder"), (-1e-3, "in s"), (2, "")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_run_notebook_declares_its_parameters(path):
    found = read_parameters(path)
    assert all(p.meaning for p in found.values()), f"no meaning: {[p.name for p in found.values() if not p.meaning]}"
    assert (REPOSITORY / "parameters" / path.stem).is_dir(), "no parameter file"


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_parameter_file_fits_its_notebook(path):
    values, problems = read_yaml(path, read_parameters(REPOSITORY / f"nbs/run/{path.parent.name}.ipynb"), REPOSITORY)
    assert not problems
    assert path.read_text().startswith("# "), "the first line says which experiment this is"
    elsewhere = {"checkpoint", "start", "judge", "data", "device", "models"}  # what another run, or the reader, has to provide first
    assert [p for p in check(path.parent.name, values, REPOSITORY) if p.split(":")[0] not in elsewhere] == []


WRONG = [  # a file, what is changed in it, the key that the one line names
    ("train/austen_duo", {"lr_decay": "halving"}, "halve_every"),
    ("train/austen_duo", {"lr_decay": "constant", "lr_min": 1e-4}, "lr_min"),
    ("train/austen_duo", {"lr_min": 1.0}, "lr_min"),
    ("train/austen_duo", {"betas": [0.9]}, "betas"),
    ("train/austen_duo", {"betas": [0.9, 1.0]}, "betas"),
    ("train/austen_duo", {"adam_eps": 0.0}, "adam_eps"),
    ("train/austen_duo", {"schedule_eps": 0.0}, "schedule_eps"),
    ("train/austen_duo", {"t_min": 1.0}, "t_min"),
    ("train/austen_duo", {"tau_hold": 5}, "tau_hold"),
    ("train/austen_udlm", {"tau_end": 0.1}, "tau_end"),
    ("train/austen_ar", {"times": "independent"}, "times"),
    ("train/austen_duo", {"layout": "padded", "separator": "eos"}, "separator"),
    ("train/twemoji_duo", {"layout": "packed"}, "layout"),
    ("train/twemoji_duo", {"method": "sedd_uniform", "curriculum": "none"}, "method"),
    ("train/twemoji_duo", {"method": "gidd", "curriculum": "none", "p_uniform": 0.1}, "method"),
    ("distil/austen_duo", {"delta_max": 1e-4}, "delta_max"),
    ("sample/austen_duo_rescale", {"high": "cap", "high_eta": 0.1}, "sampler"),
    ("sample/austen_duo_rescale", {"low_eta": 0.1, "high_frac": 0.5, "middle_frac": 0.4}, "sampler"),
    ("fid/twemoji_duo", {"hold": 0.9}, "sampler"),
    ("likelihood/austen_duo", {"layout": "padded", "separator": "none"}, "separator"),
    ("train/austen_duo", {"max_steps": -3}, "max_steps"),
    ("train/austen_duo", {"tokenizer": "foo"}, "tokenizer"),
    ("sample/austen_duo", {"top_p": 2.0}, "top_p"),
    ("sample/austen_duo", {"sampler": "psi"}, "kappa"),
]


@pytest.mark.parametrize("name, change, key", WRONG, ids=[f"{name}-{'-'.join(change)}" for name, change, _ in WRONG])
def test_what_does_not_go_together_is_refused_in_one_line(name, change, key):
    verb = name.split("/")[0]
    values, _ = read_yaml(REPOSITORY / f"parameters/{name}.yaml", read_parameters(REPOSITORY / f"nbs/run/{verb}.ipynb"), REPOSITORY)
    problems = check(verb, values | change, REPOSITORY)
    assert [p.split(":")[0] for p in problems] == [key] and "\n" not in problems[0], problems


@pytest.mark.parametrize("name, words, line", [
    ("train/austen_duo", ["max_steps=3"], "command line: max_steps=3 with the file's curriculum_steps: given "),
    ("sample/owt_duo", [], "parameters/sample/owt_duo.yaml: checkpoint: given outputs/train/owt_duo/checkpoints, which is not there; allowed after duo-run train/owt_duo"),
])
def test_a_problem_names_its_cause(name, words, line, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("DUO_OUTPUTS", raising=False)
    with pytest.raises(RunError) as refused:
        plan(name, words)
    assert refused.value.problems[0].startswith(line), refused.value.problems


def test_a_missing_folder_of_copies_and_an_empty_file_are_refused(tmp_path, monkeypatch):
    values, _ = read_yaml(REPOSITORY / "parameters/train/austen_duo.yaml", read_parameters(REPOSITORY / "nbs/run/train.ipynb"), REPOSITORY)
    (tmp_path / "nothing.txt").touch()
    assert check("train", values | {"data": str(tmp_path / "nothing.txt")}, REPOSITORY)[0].endswith("no text in it")
    monkeypatch.setenv("DUO_DATA", str(tmp_path / "nowhere"))
    problem, = check("train", values, REPOSITORY)
    assert problem.startswith("DUO_DATA: given ") and "\n" not in problem
