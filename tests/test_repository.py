"""What a notebook cell can't hold: nbs/ and duo/ agree, rooms import downwards only, imports stay light, names stay public."""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
ROOMS = {p.stem.split("_", 1)[1]: i for i, p in enumerate(NOTEBOOKS) if p.parent.name == "nbs" and p.stem[:2] != "00"}
MODULES = sorted(p for p in (ROOT / "duo").glob("*.py") if not p.stem.startswith("_"))


def source(cell):
    return "".join(cell["source"])


def test_notebooks_and_package_agree(tmp_path):
    """A fresh export of nbs/ gives duo/ to the byte, with no module left over."""
    for name in ("settings.ini", "nbs", "README.md"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / "duo").mkdir()
    shutil.copy(ROOT / "duo/__init__.py", tmp_path / "duo")
    subprocess.run([sys.executable, "-c", "from nbdev.export import nb_export\nfrom nbdev.doclinks import nbdev_export\nnbdev_export()"], cwd=tmp_path, check=True)
    fresh = {p.name: p.read_text(encoding="utf-8") for p in (tmp_path / "duo").glob("*.py")}
    kept = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "duo").glob("*.py")}
    assert fresh.keys() == kept.keys()
    assert [name for name in fresh if fresh[name] != kept[name]] == []


def test_notebooks_are_clean(tmp_path):
    """nbdev_clean changes nothing, no notebook holds an error, and run notebooks keep their parameters tag."""
    copies = [shutil.copy(p, tmp_path / f"{p.parent.name}_{p.name}") for p in NOTEBOOKS]
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for original, copy in zip(NOTEBOOKS, copies):
        subprocess.run([sys.executable, "-c", "import sys\nfrom nbdev.clean import nbdev_clean\nnbdev_clean(fname=sys.argv[1])", copy], cwd=tmp_path, check=True)
        assert json.loads(Path(copy).read_text()) == json.loads(original.read_text()), f"run nbdev_clean on {original.relative_to(ROOT)}"
        cells = json.loads(original.read_text())["cells"]
        assert not any(o["output_type"] == "error" for c in cells for o in c.get("outputs", [])), original
        shown = [json.dumps({k: v for k, v in o.items() if k != "data"} | {"text/plain": o.get("data", {}).get("text/plain")}) for c in cells for o in c.get("outputs", [])]
        assert not any(re.search(r"site-packages|/(home|root|work|Users)/|/tmp/", text) for text in shown), f"{original} shows a path of one machine"
        assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == (original.parent.name == "run"), original


def test_rooms_import_lower_rooms_only():
    assert sorted(p.stem for p in MODULES) == sorted(ROOMS)
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text())):
            name = (node.module or "") if isinstance(node, ast.ImportFrom) and node.level == 1 else ""
            if name:
                assert ROOMS[name] < ROOMS[module.stem], f"{module.stem} imports {name}"
            assert not (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("nbdev", "fastcore")), module


@pytest.mark.parametrize("module, refused", [
    ("processes", "lightning transformers datasets papermill numpy.testing matplotlib"), ("likelihood", "lightning transformers datasets papermill matplotlib"),
    ("hub", "lightning transformers datasets papermill matplotlib"), ("runs", "lightning transformers datasets torch matplotlib")])
def test_imports_stay_light(module, refused):
    code = f"import sys, duo.{module}; print(*sorted(m for m in {refused.split()!r} if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_public_names_have_docstrings():
    missing = []
    for module in MODULES:
        tree = ast.parse(module.read_text())
        public = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"), [])
        missing += [f"{module.stem}.{n.name}" for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in public and not ast.get_docstring(n)]
    assert missing == []


def test_names_that_outside_programs_call():
    code = """
import inspect
from duo import curriculum, data, dit, duality, hub, likelihood, processes, samplers, schedules
def has(f, *names): assert list(inspect.signature(f).parameters)[:len(names)] == list(names), (f, inspect.signature(f))
has(schedules.LogLinear, "eps"); has(schedules.Cosine, "eps"); has(schedules.low_discrepancy, "n", "eps", "generator", "device")
has(processes.Uniform, "vocab_size"); has(processes.Absorbing, "vocab_size", "mask_id"); has(processes.Hybrid, "vocab_size", "mask_id", "p_uniform")
P = processes.Uniform
has(P.corrupt, "self", "x0", "alpha", "generator"); has(P.sample_prior, "self", "shape", "generator", "device"); has(P.marginal, "self", "p", "alpha")
has(P.posterior, "self", "p_x0", "xt", "alpha_s", "alpha_t", "kappa"); has(P.mixture, "self", "p_xt", "xt", "alpha_s", "alpha_t", "kappa")
has(P.draw, "self", "logits", "xt", "alpha_s", "alpha_t", "kappa", "top_p", "generator")
has(duality.uniform_alpha, "gamma", "vocab_size"); has(duality.gamma_window, "vocab_size", "alpha_min", "alpha_max")
has(likelihood.nelbo, "process", "log_p", "x0", "xt", "alpha", "alpha_dot")
has(likelihood.linear_nelbo, "process", "hidden", "weight", "bias", "x0", "xt", "alpha", "alpha_dot", "chunk")
has(likelihood.score_nelbo, "process", "log_score", "x0", "xt", "alpha", "alpha_dot")
has(likelihood.d3pm_nelbo, "process", "log_p", "x0", "xt", "t", "T", "schedule")
has(curriculum.relax, "x0", "gamma", "tau", "vocab_size", "top_k", "generator"); has(dit.DiT, "config")
has(samplers.sample, "denoiser", "process", "schedule", "shape", "steps", "sampler", "tail", "top_p", "prompt", "generator", "callback")
has(hub.save, "model"); hub.load
"""
    subprocess.run([sys.executable, "-c", code], check=True)
