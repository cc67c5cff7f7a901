"""The package outside of its repository: a wheel, a bare environment, light imports, compiled networks."""
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout."""
    home = tmp_path_factory.mktemp("wheel")
    source = home / "source"
    source.mkdir()
    for name in ("duo", "settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE", "CITATION.cff", "constraints.txt", "nbs", "tests", "parameters"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(home), str(source)], check=True, capture_output=True)
    return next(home.glob("*.whl"))


def test_the_wheel_is_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    about = next(n for n in names if n.endswith("METADATA"))
    assert {name.split("/")[0] for name in names} == {"duo", about.split("/")[0]}
    assert {Path(n).suffix or Path(n).name for n in names if n.startswith("duo/") and "assets" not in n} == {".py", ".typed"}
    assert not [n for n in names if n.endswith(".ipynb") or Path(n).name.startswith("test_")]
    assert sum(n.endswith(("LICENSE", "NOTICE")) for n in names) == 2
    lines = zipfile.ZipFile(wheel).read(about).decode().splitlines()
    needed = {re.match(r"[\w-]+", line.split(": ", 1)[1])[0] for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line}
    assert needed == {"torch", "numpy", "safetensors", "huggingface_hub", "tokenizers"}
    assert {f"Provides-Extra: {name}" for name in ("train", "run", "gpu", "eval", "dev", "tensorboard", "wandb", "trackio")} <= set(lines)


def closure(*names):
    """The distributions that these need, themselves included."""
    names, found = list(names), {}
    while names:
        name = names.pop()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of another system
            continue
        names += [re.match(r"[\w.-]+", line)[0] for line in found[name].requires or () if "extra ==" not in line]
    return found.values()


def test_a_bare_environment_writes_and_judges(wheel, tmp_path):
    """A fresh environment with the wheel and what it requires, linked from here, and neither Lightning nor papermill."""
    venv.create(tmp_path / "venv", with_pip=False)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    for distribution in closure("torch", "numpy", "safetensors", "huggingface_hub", "tokenizers"):
        for top in {Path(f).parts[0] for f in distribution.files or () if not {"..", "__pycache__"} & {*Path(f).parts}}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    zipfile.ZipFile(wheel).extractall(site)
    code = """
import importlib.util, sys
assert not [name for name in ("lightning", "papermill", "transformers", "datasets", "IPython") if importlib.util.find_spec(name)]
import duo
assert "torch" not in sys.modules
model = duo.load(sys.argv[1])
text, = model.sample(1, steps=4, prompt="It is a truth", seed=0)
scores = model.nll(["It is a truth universally acknowledged", "that a single man"])
assert text.startswith("It is a truth") and model.decode(model.encode("It is")) == "It is" and (scores.nats > 0).all()
print(duo.__file__)
"""
    words = [tmp_path / "venv/bin/python", "-c", code, ROOT / "outputs/train/austen_duo/checkpoints"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and str(site) in done.stdout, done.stderr
    words[2] = "from duo.runs import main; raise SystemExit(main(['--help']))"
    assert "duo-run VERB/NAME" in subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout


def test_imports_bring_only_what_the_core_needs():
    heavy = "lightning pytorch_lightning transformers datasets papermill IPython matplotlib pandas scipy wandb tensorboard trackio".split()
    code = f"""
import importlib, sys
for module in ("duo", "duo.processes", "duo.likelihood", "duo.samplers", "duo.hub"):
    importlib.import_module(module)
    print(*[(module, m) for m in {heavy!r} + ["torch"] * (module == "duo") if m in sys.modules], end="")
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == ""


def test_public_annotations_evaluate():
    """What an editor reads because of py.typed exists."""
    code = """
import inspect, typing, duo
from duo import hub, metrics, processes, samplers, schedules
for module in (hub, metrics, processes, samplers, schedules):
    for name in module.__all__:
        thing = getattr(module, name)
        for f in [thing] if inspect.isfunction(thing) else [m for _, m in inspect.getmembers(thing, inspect.isfunction)] if inspect.isclass(thing) else []:
            if f.__module__.startswith("duo"):
                typing.get_type_hints(f)
assert typing.get_type_hints(duo.load)["return"] is hub.Model and duo.load is hub.load
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_type_checker_says_of_a_program(tmp_path):
    """The types of the library are those that its users see; torch is left out, which takes mypy a minute."""
    (tmp_path / "mypy.ini").write_text("[mypy]\nignore_missing_imports = True\nfollow_imports = silent\n"
                                       "[mypy-torch.*,numpy.*,transformers.*,datasets.*,tokenizers.*]\nfollow_imports = skip\n")
    (tmp_path / "program.py").write_text("""
import duo
from duo.samplers import Psi
model = duo.load("somewhere")
reveal_type(model.sample(2, steps=8, prompt="It is", seed=1, sampler=Psi(kappa=0.9)))
reveal_type(model.nll(["a"]).bits_per_character().mean)
reveal_type(model.length)
model.sample("two")
model.nlls(["a"])
""")
    words = [sys.executable, "-m", "mypy", "--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "program.py")]
    said = subprocess.run(words, cwd=ROOT, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True).stdout.splitlines()
    assert [line.partition(": ")[2] for line in said[:-1]] == [
        'note: Revealed type is "list[str]"', 'note: Revealed type is "float"', 'note: Revealed type is "int"',
        'error: Argument 1 to "sample" of "Model" has incompatible type "str"; expected "int"  [arg-type]',
        'error: "Model" has no attribute "nlls"; maybe "nll"?  [attr-defined]'], said


def test_a_logger_by_its_name_hears_every_row(tmp_path, monkeypatch):
    """Trackio, in whose place stands a module that takes note of what it is told."""
    from duo.data import Batches, documents, pack, tokenizer
    from duo.dit import DiTConfig
    from duo.schedules import LogLinear
    from duo.training import Training, fit, logger_for

    (tmp_path / "trackio.py").write_text("told = []\ninit = lambda **words: told.append(words) or 1\nlog = lambda row, step: told.append((step, *row))\nfinish = lambda: told.append('end')\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = pack(documents("austen"), tokenizer("char"), 32)
    module = Training(DiTConfig(81, 16, 1, 2, 16), "duo", vocab_size=81, schedule=LogLinear(), batch_size=8, max_steps=4)
    fit(module, Batches(text, 8, 3), text[:8], tmp_path / "run", max_steps=4, valid_every=2, logger=logger_for("trackio", tmp_path / "run"))
    row = ("tokens", "seconds", "lr", "train_nll", "valid_nll")
    assert sys.modules.pop("trackio").told == [{"project": "duo", "name": "run", "resume": "allow"}, (2, *row), (4, *row), "end"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a processor needs g++")
def test_a_compiled_network_trains_alike(tmp_path):
    code = f"""
import torch
torch.set_num_threads(1)
from duo.data import Batches, documents, pack, tokenizer
from duo.dit import DiTConfig
from duo.schedules import LogLinear
from duo.training import Training, fit
text, losses = pack(documents("austen"), tokenizer("char"), 32), []
for compile in (False, True):
    module = Training(DiTConfig(81, 32, 1, 2, 16, dropout=0.0), "duo", vocab_size=81, schedule=LogLinear(), batch_size=8, max_steps=4, lr=1e-2, seed=3, compile=compile)
    losses.append(fit(module, Batches(text, 8, 3), text[:8], {str(tmp_path)!r} + f"/{{compile}}", max_steps=4, valid_every=4)["valid_nll"])
print(losses)
assert abs(losses[0] - losses[1]) < 1e-4
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
