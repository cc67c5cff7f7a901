"""A training that is killed at any moment goes on when its command is repeated, and ends at the bits of the unbroken one."""
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

import duo

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["tokenizer=char", "length=32", "hidden_size=32", "n_blocks=1", "n_heads=2", "cond_dim=16", "batch_size=8", "max_steps=400", "curriculum_steps=100",
         "warmup_steps=5", "valid_every=40", "valid_blocks=8", "valid_samples=2", "checkpoint_every=10"]


def command(folder):
    return [sys.executable, "-c", "from duo.runs import main; raise SystemExit(main())", "train/demo_duo", *SMALL, "--output", str(folder)]


def test_killed_and_repeated(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    subprocess.run(command(unbroken), cwd=ROOT, env=env, check=True, capture_output=True)
    first = subprocess.Popen(command(broken), cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    last, best, until = broken / "checkpoints" / "last.ckpt", broken / "checkpoints" / "best.ckpt", time.time() + 120
    while not best.exists() and time.time() < until:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    stopped_at = torch.load(last, weights_only=True)["global_step"]
    assert 0 < stopped_at < 400 and not (broken / "metrics.json").exists()
    so_far = [duo.load(place) for place in (broken / "checkpoints", best)]  # from the first validation on
    assert all(model.training["data"] == "austen" and len(model.sample(2, 4, seed=0)) == 2 for model in so_far)
    subprocess.run(command(broken), cwd=ROOT, env=env, check=True, capture_output=True)
    a, b = (json.loads((folder / "metrics.json").read_text()) for folder in (unbroken, broken))
    assert a["valid_nll"] == b["valid_nll"]
    a, b = ([json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()] for folder in (unbroken, broken))
    assert a == b and [row["step"] for row in a] == [step for step in range(40, 401, 40) for _ in range(2)]
    a, b = ((folder / "checkpoints" / "model.safetensors").read_bytes() for folder in (unbroken, broken))
    assert a == b


# What follows starts many processes; they are forks of one that has imported everything and trained nothing, so that each costs a second.

def work(kind, folder):
    """The same command each time: a small training with curriculum and dropout, or a distillation in rounds, in a folder."""
    from duo.curriculum import Curriculum
    from duo.data import Batches, documents, pack, tokenizer
    from duo.distillation import Distillation
    from duo.dit import DiT, DiTConfig
    from duo.schedules import LogLinear
    from duo.training import Training, fit

    text = pack(documents("austen"), tokenizer("char"), 32)
    options = dict(vocab_size=81, schedule=LogLinear(), batch_size=8, max_steps=40, lr=1e-2, warmup_steps=3, ema=0.9, seed=3)
    config, places = DiTConfig(81, 32, 2, 2, 16), dict(valid_every=10, checkpoint_every=1 if kind == "writing" else 4)
    if kind == "distilling":
        torch.manual_seed(0)
        module = Distillation(DiT(config), steps_per_round=10, delta=1 / 8, **options)
        for stop in (10, 20, 30, 40):
            fit(module, Batches(text, 8, 3), text[:16], folder, max_steps=stop, **places)
    else:
        fit(Training(config, "duo", curriculum=Curriculum(3, 1e-3, 20), **options), Batches(text, 8, 3), text[:16], folder, max_steps=40, **places)


def start(kind, folder):
    """The process that does it."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        work(kind, folder)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def state(folder):
    """Weights, moments, averages, teacher, and the curve without its clock."""
    found = torch.load(Path(folder, "checkpoints/last.ckpt"), weights_only=True)
    curve = [line.split(",")[:2] + line.split(",")[3:] for line in Path(folder, "curve.csv").read_text().splitlines()]
    moments = [v for s in found["optimizer_states"][0]["state"].values() for v in s.values()]
    return [*found["state_dict"].values(), *moments], curve, sorted(p.name for p in Path(folder).rglob("*") if p.suffix != ".tmp")


def kills(home, number):
    """Kills trainings, distillations and writing checkpoints, `number` in all, at moments drawn from a seed; each goes on to the unbroken end."""
    import lightning  # noqa: F401, before any fork
    import duo.distillation  # noqa: F401

    draw, unbroken, took = random.Random(6), {}, {}
    for i in range(number):
        kind = ("writing", "distilling", "training")[i % 3]
        if kind not in unbroken:
            began, folder = time.time(), Path(home, kind)
            assert os.waitpid(start(kind, folder), 0)[1] == 0
            unbroken[kind], took[kind] = state(folder), time.time() - began
        folder, moment = Path(home, f"{kind}{i}"), draw.uniform(0, took[kind])
        pid, began, temporary = start(kind, folder), time.time(), folder / "checkpoints/last.ckpt.tmp"
        while time.time() < began + moment or kind == "writing" and not temporary.exists():
            if os.waitpid(pid, os.WNOHANG)[0]:
                break
            time.sleep(0 if kind == "writing" else 0.001)
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        last = folder / "checkpoints/last.ckpt"
        at = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
        half = temporary.exists()
        assert os.waitpid(start(kind, folder), 0)[1] == 0
        (tensors, *rest), (expected, *others) = state(folder), unbroken[kind]
        same = len(tensors) == len(expected) and all(torch.equal(a, b) for a, b in zip(tensors, expected)) and rest == others
        print(f"{kind}: killed after {moment:.2f} s of {took[kind]:.2f}, checkpoint of step {at}{', half of another' * half}; same bits at the end: {same}", flush=True)
        assert same


def test_killed_at_random_moments(tmp_path, capsys):
    """DUO_KILLS kills, 2 if not told otherwise."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); from test_training import kills; kills({str(tmp_path)!r}, {os.environ.get('DUO_KILLS', 2)})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    with capsys.disabled():
        print("\n" + done.stdout, end="")
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_training_that_diverges(tmp_path):
    """One line and exit 1, the checkpoint from before is kept and loads, no model is saved; what was damaged since is not gone on from."""
    words = {"max_steps=400": "max_steps=40", "curriculum_steps=100": "curriculum_steps=10", "valid_every=40": "valid_every=10", "checkpoint_every=10": "checkpoint_every=2"}
    told = [*[words.get(word, word) for word in command(tmp_path / "run")], "lr=1e37"]
    done = subprocess.run(told, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    last, lines = tmp_path / "run/checkpoints/last.ckpt", [line for line in done.stderr.splitlines() if "Diverged" in line]
    assert done.returncode == 1 and len(lines) == 1 and "is nan at step 6 (learning rate 1e+37)" in lines[0] and "last.ckpt keeps step 4; try a lower lr" in lines[0] and "Traceback" not in done.stderr
    found = torch.load(last, weights_only=True)
    assert found["global_step"] == 4 and all(tensor.isfinite().all() for tensor in found["state_dict"].values())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "environment.json", "notebook.ipynb", "parameters.yaml"] and [*last.parent.iterdir()] == [last]
    whole = last.read_bytes()
    last.write_bytes(whole[:len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1:])
    again = subprocess.run(told, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert again.returncode != 0 and "last.ckpt" in again.stderr and "Bad CRC-32" in again.stderr and "--restart" in again.stderr, again.stderr
    last.write_bytes(whole)
    again = subprocess.run(told, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)  # goes on, though no validation has written a config.json
    assert again.returncode == 1 and "is nan at step 6" in again.stderr and "keeps step 4" in again.stderr, again.stderr
