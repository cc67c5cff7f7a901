"""Anything at the door and in the files that runs read: more than a thousand generated cases, each of which is accepted or refused in printable lines."""
import contextlib
import functools
import io
import json
import os

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from duo import runs
from duo.parameters import PATHS, RunError, check, plan, read_flat, read_json, read_overrides, read_parameters, read_text, read_yaml, shown
from test_parameters import REPOSITORY
from test_runs import FIRST, root  # noqa: F401

def anything(cases):
    """The settings of a test with so many cases, the same in each session, of which none takes 8 seconds."""
    return settings(max_examples=cases, deadline=8000, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


NASTY = ["", "\0", "\x1b[2J", "a\nb", "\u202e", "\udcff", "é" * 200, "x" * 5000, "../" * 99, "9" * 5000, "1e999", "nan", "010", "1:30", "0x10", "*a", "&a [*a]", "!!int x", "!!python/object:os.system x",
         "[" * 3000, "{}", "a: b", "'", '"', '"a,b', ",", "=", "--", "-1", "null", "~", "2024-13-45", "<<: 1", "loop", "pipe", "/dev/zero", "parameters", "/proc/self/mem", "[]", "[1, [2]]", "{{}}", "{9999999999}"]
texts = st.one_of(st.text(max_size=60), st.sampled_from(NASTY), st.text(alphabet="\0\x1b\n[]{}&*!:,-#'\"0123456789abcë\u202e", max_size=60))
KEYS = ["steps", "lr", "kind", "sizes", "label", "flag", "output", "step", "LR", "\x1b", "x" * 300]


def is_line(line):
    """Whether a message is one printable line that shows no more than it should of what came from outside."""
    return line.isprintable() and len(line) < 700 and not any(c * 81 in line for c in "éx9[")


@contextlib.contextmanager
def refusals():
    """What may happen: nothing, or a refusal in lines."""
    try:
        yield
    except RunError as error:
        assert error.problems and all(map(is_line, error.problems)), error.problems
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 700, error


@pytest.fixture
def place(root):  # noqa: F811
    """The toy repository with what a path may meet: a loop of links and a pipe."""
    os.symlink("loop", root / "loop")
    os.mkfifo(root / "pipe")
    (root / "a run").mkdir()
    return root


@anything(250)
@given(words=st.lists(st.one_of(texts, st.tuples(st.sampled_from(KEYS), texts).map("=".join), st.sampled_from(["--output", "--slurm", "--restart", "--list", "--help", "--smoke", "collect"])), max_size=4))
def test_a_command_line(place, words):
    out, err = io.StringIO(), io.StringIO()
    before = sorted(os.listdir(place))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = runs.main(["toy/first", "--dry-run", *words] if words[:1] != ["collect"] else words)
    assert status in (0, 2) and all(map(is_line, err.getvalue().split("\n"))), err.getvalue()
    assert status == 0 or err.getvalue() and sorted(os.listdir(place)) == before


@anything(100)
@given(target=texts, words=st.lists(st.tuples(st.sampled_from(KEYS), texts).map("=".join), max_size=3), output=st.none() | texts)
def test_a_plan(place, target, words, output):
    parameters = read_parameters(place / "nbs/run/toy.ipynb")
    assert all(map(is_line, read_overrides(words, parameters)[1]))
    with refusals():
        plan(target, words, output, root=place)
    with refusals():
        runs._prepare(plan("toy/first", (), output, root=place)[0], place, True)


BOMB = "a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24))


@anything(250)
@example(lines=["[" * 5000], keep=False)
@example(lines=["steps: " + "{a: " * 5000], keep=True)
@example(lines=["- " * 5000], keep=False)
@example(lines=[BOMB], keep=False)
@example(lines=["x: 1"] * 15_000, keep=False)
@given(lines=st.lists(st.one_of(texts, st.tuples(st.sampled_from(KEYS), texts).map(": ".join)), max_size=4), keep=st.booleans())
def test_a_parameter_file(place, lines, keep):
    path = place / "parameters/toy/second.yaml"
    path.write_bytes((FIRST * keep + "\n".join(lines)).encode("utf-8", "surrogateescape" if "\udcff" in "".join(lines) else "surrogatepass"))
    values, problems = read_yaml(path, read_parameters(place / "nbs/run/toy.ipynb"), place)
    assert all(map(is_line, map(runs.printable, problems)))
    with refusals():
        read_flat(path)


@anything(300)
@given(name=st.sampled_from(["parameters.yaml", "environment.json", "metrics.json", "samples.jsonl", "curve.csv"]), start=st.booleans(), data=st.binary(max_size=80) | texts.map(lambda t: t.encode("utf-8", "replace"))
       | st.recursive(st.none() | st.floats() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["sessions", "files", "status", "a"]), inner, max_size=3))
       .map(lambda value: json.dumps(value).encode()))
def test_a_file_of_a_run(place, name, start, data):
    folder = place / "a run"
    for path in folder.iterdir():
        path.unlink()
    (folder / "parameters.yaml").write_text("# duo-run toy/first\n" + FIRST)
    (folder / name).write_bytes((b"# duo-run toy/first\n" if start and name.endswith("yaml") else b"") + data)
    run = runs.Run(folder)
    for read in (run.metrics, run.curve, run.samples, lambda: run.parameters, lambda: read_json(folder / name), lambda: runs._own(folder)):
        with refusals():
            read()
    (_, _), = runs.collected([folder], place)


KEYS_OF = {"train/austen_duo": ["data", "tokenizer", "start", "length", "seed", "top_k", "lr", "batch_size", "betas", "layout", "precision"],
           "sample/austen_duo": ["checkpoint", "judge", "prompt", "steps", "n", "length", "stride", "labels", "guidance", "kappa", "t_last"]}


@pytest.mark.parametrize("name", KEYS_OF)
@anything(150)
@given(case=st.data(), value=texts | st.integers() | st.floats() | st.none() | st.lists(st.integers() | texts, max_size=3))
def test_a_value_of_a_run(place, name, case, value):
    parameters, values = read(name)
    key, verb = case.draw(st.sampled_from(KEYS_OF[name])), name.split("/")[0]
    assert all(map(is_line, map(runs.printable, read_overrides([f"{key}={value}"], parameters)[1])))
    with refusals():
        problems = check(verb, values | {key: parameters[key].fit(value)}, place if verb == "train" else REPOSITORY)
        assert all(map(is_line, map(runs.printable, problems))), problems


@functools.cache
def read(name):
    """The parameters of a run's notebook and the values of its file."""
    parameters = read_parameters(REPOSITORY / f"nbs/run/{name.split('/')[0]}.ipynb")
    return parameters, read_yaml(REPOSITORY / f"parameters/{name}.yaml", parameters, REPOSITORY)[0]


@anything(100)
@given(name=texts)
def test_a_path(place, name):
    with refusals():
        read_text(place / name, 1000)
    assert len(shown(name)) <= 80 and shown(name).isprintable()
