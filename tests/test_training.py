"""A training that is killed at any moment goes on when its command is repeated, and ends at the bits of the unbroken one."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["tokenizer=char", "length=32", "hidden_size=32", "n_blocks=1", "n_heads=2", "cond_dim=16", "batch_size=8", "max_steps=400", "curriculum_steps=100",
         "warmup_steps=5", "valid_every=20", "valid_blocks=8", "checkpoint_every=10"]


def command(folder):
    return [sys.executable, "-c", "from duo.runs import main; raise SystemExit(main())", "train/demo_duo", *SMALL, "--output", str(folder)]


def test_killed_and_repeated(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    subprocess.run(command(unbroken), cwd=ROOT, env=env, check=True, capture_output=True)
    first = subprocess.Popen(command(broken), cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    last, until = broken / "checkpoints" / "last.ckpt", time.time() + 120
    while not last.exists() and time.time() < until:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    stopped_at = torch.load(last, weights_only=True)["global_step"]
    assert 0 < stopped_at < 400 and not (broken / "metrics.json").exists()
    subprocess.run(command(broken), cwd=ROOT, env=env, check=True, capture_output=True)
    a, b = (json.loads((folder / "metrics.json").read_text()) for folder in (unbroken, broken))
    assert a["valid_nll"] == b["valid_nll"]
    a, b = ((folder / "checkpoints" / "model.safetensors").read_bytes() for folder in (unbroken, broken))
    assert a == b
