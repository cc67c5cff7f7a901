"""The parameters of this repository: every run notebook declares them, every file of parameters/ fits its notebook."""
from pathlib import Path

import nbformat
import pytest

from duo.parameters import check, read_parameters, read_yaml

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
    elsewhere = {"checkpoint", "judge", "data", "device", "models"}  # what another run, or the reader, has to provide first
    assert [p for p in check(path.parent.name, values, REPOSITORY) if p.split(":")[0] not in elsewhere] == []
