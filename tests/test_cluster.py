"""Several processes, for real, on this machine's processor: torchrun and gloo, and SLURM's commands as small programs on the PATH."""
import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from duo import runs
from duo.curriculum import Curriculum
from duo.data import Batches, documents, pack, tokenizer
from duo.dit import DiTConfig
from duo.schedules import LogLinear

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class Deadly(Batches):
    """The training order, in which the second process is killed when it asks for step 8; one that is alone fails."""

    def batch(self, step):
        if step == 8 and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 8 and "RANK" not in os.environ:
            raise OSError("the disk is gone")
        return super().batch(step)


def train(folder, strategy="auto", kind=Batches):
    """Twelve steps of a small Duo with curriculum and dropout, in pieces of 2 rows, that writes two texts after each validation; its module."""
    from duo.hub import Model, save
    from duo.training import Training, fit

    text = pack(documents("austen"), tokenizer("char"), 32)
    module = Training(DiTConfig(81, 32, 2, 2, 16), "duo", vocab_size=81, schedule=LogLinear(), curriculum=Curriculum(3, 1e-3, 6), batch_size=8, max_steps=12,
                      lr=1e-2, warmup_steps=3, ema=0.9, seed=3, adam_eps=1e-6)

    def look(step, first):
        model = Model(module.ema, "duo", LogLinear(), tokenizer("char"), 32)
        texts = model.sample(2, 4, seed=0)
        if first:
            save(model, Path(folder, "checkpoints"), weights=False)
            Path(folder, f"texts-{step}").write_text("\n---\n".join(texts))

    fit(module, kind(text, 8, seed=3), text[:21], folder, max_steps=12, device_batch_size=2, strategy=strategy, valid_every=4, checkpoint_every=3, look=look)
    return module


def distil(folder, strategy="auto", stops=(12,)):
    """Two rounds of six steps of a small uniform model, with a fit up to each of the stops."""
    from duo.dit import DiT
    from duo.distillation import Distillation
    from duo.training import fit

    torch.manual_seed(0)
    net = DiT(DiTConfig(81, 32, 2, 2, 16))
    torch.nn.init.normal_(net.head.weight, std=0.5)
    text = pack(documents("austen"), tokenizer("char"), 32)
    module = Distillation(net, vocab_size=81, schedule=LogLinear(), batch_size=8, max_steps=12, lr=1e-3, warmup_steps=3, ema=0.9, seed=3, steps_per_round=6, delta=1 / 8)
    for stop in stops:
        fit(module, Batches(text, 8, seed=3), text[:21], folder, max_steps=stop, device_batch_size=4, strategy=strategy, valid_every=4, checkpoint_every=3)


def deadly_write():
    """From now on the second process is killed when it has written half of its shard of step 9."""
    from duo import training

    write = training.save_tensors

    def half(tensors, path):
        write(tensors, path)
        if ".9." in str(path) and "last" in str(path) and os.environ["RANK"] == "1":
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    training.save_tensors = half


def curve(folder):
    """(rows, 3): step, training and validation nats."""
    with open(Path(folder, "curve.csv")) as file:
        return torch.tensor([[float(row[k]) for k in ("step", "train_nll", "valid_nll")] for row in csv.DictReader(file)], dtype=torch.float64)


def apart(a, b):
    """The largest difference of two curves."""
    assert a.shape == b.shape == (3, 3)
    return (a - b).abs().max().item()


def weights_apart(a, b):
    """The largest difference of two checkpoints' weights, averages and teachers."""
    from duo.training import Checkpoint

    a, b = (Checkpoint(Path(folder, "checkpoints/last.ckpt")).whole("state_dict")["state_dict"] for folder in (a, b))
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def launch(code, processes=2):
    """Some processes that execute `code` after the definitions of this file."""
    words = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); from test_cluster import *; {code}"
    return subprocess.run([*TORCHRUN, str(processes), "--no-python", sys.executable, "-c", words], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)


def test_many_processes_ddp_and_fsdp(tmp_path, capsys):
    from duo.hub import load
    from duo.training import Checkpoint

    torch.set_num_threads(1)
    runs = "one ddp fsdp killed killed_ddp writing writing_4 failed distil_1 distil_ddp distil_fsdp".split()
    folder = {name: tmp_path / name for name in runs}
    last = {name: path / "checkpoints/last.ckpt" for name, path in folder.items()}
    code = f"""
from duo import training
train({str(folder['ddp'])!r}, "ddp")
distil({str(folder['distil_ddp'])!r})
shares, configure = [], training.Training.configure_model
def look(self):
    configure(self)
    shares.append(sum(p.to_local().numel() for p in self.parameters()) / sum(p.numel() for p in self.parameters()))
training.Training.configure_model = look
train({str(folder['fsdp'])!r}, "fsdp")
assert 0.49 < shares[0] < 0.52, shares
distil({str(folder['distil_fsdp'])!r}, "fsdp", (4, 8))
train({str(folder['killed'])!r}, "fsdp", Deadly)"""
    done = launch(code)
    assert done.returncode and "Signal 9" in done.stderr and "Error" not in done.stdout, done.stderr[-3000:]
    shutil.copytree(folder["killed"], folder["killed_ddp"])
    shutil.copytree(folder["killed"], folder["writing"])
    with pytest.raises(OSError, match="the disk is gone"):
        train(folder["failed"], kind=Deadly)
    for name in ("one", "killed"):
        train(folder[name])
    for name in ("distil_1", "distil_fsdp"):
        distil(folder[name])
    done = launch(f"train({str(folder['killed_ddp'])!r}, 'ddp'); train({str(folder['failed'])!r}, 'fsdp'); deadly_write(); train({str(folder['writing'])!r}, 'fsdp')")
    assert done.returncode and "Signal 9" in done.stderr and "Error" not in done.stdout, done.stderr[-3000:]
    halves = sorted(p.stat().st_size for p in folder["writing"].glob("checkpoints/last.9.*/*"))
    wholes = sorted(p.stat().st_size for p in folder["writing"].glob("checkpoints/last.6.*/*"))
    assert len(wholes) == len(halves) == 2 and halves[0] < 0.6 * halves[1] and Checkpoint(last["writing"]).state["global_step"] == 6
    shutil.copytree(folder["writing"], folder["writing_4"])
    for processes, name in ((2, "writing"), (4, "writing_4")):
        done = launch(f"train({str(folder[name])!r}, 'fsdp')", processes)
        assert done.returncode == 0, done.stderr[-3000:]
        assert [len(list(path.iterdir())) for path in folder[name].glob("checkpoints/last.*.shards")] == [processes]
    assert all((folder["fsdp"] / f"texts-{step}").read_text() == (folder["one"] / f"texts-{step}").read_text() for step in (4, 8, 12))
    loaded, ema = load(folder["fsdp"] / "checkpoints").net.state_dict(), Checkpoint(last["fsdp"]).whole("state_dict")["state_dict"]
    assert all(torch.equal(weight, ema[f"ema.{name}"]) for name, weight in loaded.items())
    damaged(folder["fsdp"], tmp_path / "damaged")
    against, curves = {"fsdp": "ddp", **{name: "distil_1" for name in runs if "distil" in name}}, {name: curve(path) for name, path in folder.items()}
    names = {"ddp": "2 processes (ddp) and 1", "fsdp": "2 (fsdp) and 2 (ddp)", "killed": "2 (fsdp), one killed, then 1", "killed_ddp": "2 (fsdp), one killed, then 2 (ddp)",
             "writing": "2 (fsdp), one killed while it writes, then 2 (fsdp)", "writing_4": "the same, then 4 (fsdp)", "failed": "1, failed, then 2 (fsdp)",
             "distil_ddp": "distillation, 2 (ddp) and 1", "distil_fsdp": "distillation, 2 (fsdp), then 1 in the middle of a round"}
    rows = [(what, apart(curves[name], curves[other := against.get(name, "one")]), weights_apart(folder[name], folder[other])) for name, what in names.items()]
    with capsys.disabled():
        print("\nlargest difference of a loss, and of a weight\n" + "\n".join(f"  {loss:.1e}  {weight:.1e}  {what}" for what, loss, weight in rows))
    for what, loss, weight in rows:
        assert loss < 1e-5 and weight < 1e-5, what
    # as many processes as before: the same bits, but for the mean of training losses, which they sum in another order after a resume
    assert weights_apart(folder["writing"], folder["fsdp"]) == 0 and torch.equal(curves["writing"][:, 2], curves["fsdp"][:, 2])


def damaged(folder, place):
    """One shard of a checkpoint cut short, then missing: a line that names it."""
    shutil.copytree(folder, place)
    (shard,) = place.glob("checkpoints/last.*/1-of-2.safetensors")
    for damage, what in ((lambda: os.truncate(shard, shard.stat().st_size - 1), "damaged"), (shard.unlink, "missing")):
        damage()
        with pytest.raises(ValueError, match="(?s)^[^\n]*$") as told:
            train(place)
        assert str(told.value).startswith(f"{shard}: {what}") and "a part of last.ckpt" in str(told.value)


SBATCH = """
import os, re, subprocess, sys
home, script = os.environ["FAKE_SLURM"], sys.argv[-1]
text = open(script).read()
options = dict(re.findall(r"^#SBATCH --([\\w-]+)=(.+)$", text, re.M))
assert "--requeue" in text and "--parsable" in sys.argv
print(4711, flush=True)
first, last = map(int, options.get("array", "0-0").split("-"))
if os.fork():
    os._exit(0)
os.setsid()
for number in (1, 2):
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
nodes, each = int(options["nodes"]), int(options["ntasks-per-node"])
for task in range(first, last + 1):
    env = os.environ | {"SLURM_JOB_ID": str(4711 + task), "SLURM_NTASKS": str(nodes * each), "SLURM_NTASKS_PER_NODE": str(each), "SLURM_NNODES": str(nodes),
                        "SLURM_JOB_NAME": options["job-name"], "SLURM_PROCID": "0"}
    name = "4711"
    if "array" in options:
        env |= {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": str(task)}
        name = f"4711_{task}"
    for again in range(3):
        env["SLURM_RESTART_COUNT"] = str(again)
        with open(options["output"].replace("%j", env["SLURM_JOB_ID"]), "a") as log:
            status = subprocess.run(["bash", script], cwd=options["chdir"], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log).returncode
        open(f"{home}/sessions", "a").write(f"{name} {again} {status}\\n")
        try:
            os.remove(f"{home}/requeue-{name}")
        except FileNotFoundError:
            break
open(f"{home}/done", "w").write("")
"""
SRUN = """
import os, signal, subprocess, sys
import psutil
words = sys.argv[1:]
options = {}
while words[0].startswith("--"):
    name, _, value = words.pop(0).partition("=")
    options[name] = value
n = int(os.environ["SLURM_NTASKS"])
def tell(number, frame):  # as SLURM does: every process of the step
    for child in psutil.Process().children(recursive=True):
        child.send_signal(number)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, tell)
open(os.environ["FAKE_SLURM"] + "/srun", "w").write(str(os.getpid()))
log = open(options["--output"], "a")
tasks = [subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_NODEID": "0", "SLURM_STEP_ID": "0",
                          "SLURM_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1"}) for i in range(n)]
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """
import os, sys
if sys.argv[1] == "show":
    print("JobId=4711 JobState=RUNNING Reason=None")
else:
    assert sys.argv[1] == "requeue"
    open(os.environ["FAKE_SLURM"] + "/requeue-" + sys.argv[2], "w").write("")
"""
SMALL = ("tokenizer=char length=32 hidden_size=32 n_blocks=1 n_heads=2 cond_dim=16 batch_size=8 device_batch_size=4 max_steps=120 curriculum_steps=20 warmup_steps=5 "
         "valid_every=40 valid_blocks=16 checkpoint_every=5").split()


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder with sbatch, srun and scontrol on the PATH, which run for real what they are given."""
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!{sys.executable}{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path))
    for name in ("OMP_NUM_THREADS", "DUO_OUTPUTS"):
        monkeypatch.setenv(name, {"OMP_NUM_THREADS": "1", "DUO_OUTPUTS": str(tmp_path / "outputs")}[name])
    monkeypatch.chdir(ROOT)
    return tmp_path


def wait(what, patience=240):
    """Until `what` gives something, which is returned."""
    end = time.time() + patience
    while time.time() < end:
        with contextlib.suppress(OSError, ValueError):
            if found := what():
                return found
        time.sleep(0.02)
    raise AssertionError("nothing came")


def test_an_array_that_is_interrupted_and_requeued(cluster, capsys):
    assert runs.main(["train/demo_duo", *SMALL, "seed=1,2", "--slurm", "ntasks-per-node=2", "gpus-per-node=null", "mem-per-cpu=null"]) == 0
    folder = cluster / "outputs/train/demo_duo"
    wait((folder / "seed=1/checkpoints/last.ckpt").exists)
    os.kill(int((cluster / "srun").read_text()), signal.SIGUSR1)
    wait((cluster / "done").exists)
    logs = "".join(path.read_text() for path in folder.rglob("*.out"))
    assert (cluster / "sessions").read_text().split() == "4711_0 0 0 4711_0 1 0 4711_1 0 0".split(), logs
    first = json.loads((folder / "seed=1/environment.json").read_text())["sessions"]
    assert [s["status"] for s in first] == ["stopped", "finished"]
    assert sorted(p.name for p in (folder / "seed=1/logs").iterdir()) == ["rank1.log", "slurm.out"] and "stopped by SIGUSR1" in logs
    assert runs.main(["train/demo_duo", *SMALL, "seed=1", "--output", str(cluster / "unbroken")]) == 0
    difference = apart(curve(folder / "seed=1"), curve(cluster / "unbroken"))
    capsys.readouterr()
    assert runs.main(["collect", "train/*", "--output", str(cluster / "table")]) == 0
    printed = capsys.readouterr().out
    with capsys.disabled():
        print(f"\ninterrupted, requeued, 2 processes; against 1 unbroken: largest difference of a loss {difference:.1e}\n{printed}")
    rows = list(csv.DictReader((cluster / "table/runs.csv").open()))
    assert [(r["seed"], r["status"], r["sessions"]) for r in rows] == [("1", "finished", "2"), ("2", "finished", "1")] and difference < 1e-5
    assert (cluster / "table/figures/curves.png").stat().st_size > 5000


def test_what_is_refused_before_anything_is_submitted(cluster, capsys):
    assert runs.main(["train/demo_duo", "batch_size=9", "--slurm", "nodes=2", "ntasks-per-node=2"]) == 2
    assert capsys.readouterr().err == "duo-run: command line: batch_size: given 9 for 4 devices of 2; allowed: a multiple of 8\n"
    assert runs.main(["train/demo_duo", "strategy=fsdp", "devices=2"]) == 2
    assert "torchrun --standalone --nproc-per-node 2 --no-python duo-run" in capsys.readouterr().err
    assert runs.main(["train/demo_duo", "--slurm", "--dry-run"]) == 0 and "#SBATCH --gpus-per-node=1" in capsys.readouterr().out
    assert runs.main(["train/demo_duo", "seed=1,2", "--dry-run"]) == 0 and capsys.readouterr().out.count("anew") == 2
    assert runs.main(["collect", "nothing/*"]) == 2
    assert not (cluster / "outputs").exists() and not (cluster / "sessions").exists()
