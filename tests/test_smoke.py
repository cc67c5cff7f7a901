"""Every parameter file, two steps at tiny sizes, on its real notebook: tests/smoke.py, which prints a line for each."""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_parameter_file_runs(tmp_path):
    """Two processes share the files; printed with pytest -s."""
    command, both = [sys.executable, str(ROOT / "tests/smoke.py"), "--part"], {}
    for part in ("1/2", "2/2"):
        log = open(tmp_path / f"log{part[0]}", "w+")
        both[subprocess.Popen([*command, part], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.DEVNULL, text=True)] = log
    failed = []
    for process, log in both.items():
        status = process.wait()
        log.seek(0)
        print(said := log.read())
        failed += [said[said.find("FAILED") - 40:][:4000]] * bool(status)
        log.close()
    assert not failed, "\n".join(failed)


def test_one_file_by_the_command(tmp_path):
    """duo-run VERB/NAME --smoke: the same through papermill, with what it needs before it."""
    code = "import sys; from duo.runs import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "likelihood/demo_duo", "--smoke"], cwd=ROOT, env=os.environ | {"DUO_OUTPUTS": str(tmp_path), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(p.parent.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("metrics.json")) == ["smoke/likelihood/demo_duo", "smoke/train/demo_duo"]
    done = subprocess.run([sys.executable, "-c", code, "likelihood/demo_duo", "--smoke", "--slurm"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--smoke with other options" in done.stderr
