"""The model `duo` in the real lm-evaluation-harness, offline: the shipped checkpoints, by name, on tasks from the vendored test book."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from duo.harness import OWN_TASKS, Harness, evaluate, write_tasks

REPOSITORY = Path(__file__).resolve().parents[1]
CHECKPOINTS = REPOSITORY / "outputs/train"


@pytest.mark.parametrize("method, tasks", [("ar", OWN_TASKS), ("duo", ["austen_cloze"]), ("mdlm", ["austen_cloze"])])
def test_tasks_without_a_network(method, tasks, tmp_path):
    """Printed with pytest -s: the harness's table."""
    from lm_eval.utils import make_table
    harness = Harness(CHECKPOINTS / f"austen_{method}/checkpoints", draws=2, progress=False)
    results = evaluate(harness, tasks, tmp_path, limit=6, bootstrap=10)
    print("\n" + method + "\n" + make_table(results))
    assert 0 <= results["results"]["austen_cloze"]["acc,none"] <= 1 and len(results["samples"]["austen_cloze"]) == 6
    cloze = [d for d in harness.details if d["kind"] == "loglikelihood"]
    assert len(cloze) == 24 and all(d["value"] < 0 and d["tokens"] > 0 and (d["se"] == 0) == (method == "ar") for d in cloze)
    if method == "ar":
        assert results["results"]["austen_rolling"]["bits_per_byte,none"] < 2.5


def test_by_name_with_arguments(tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=str(write_tasks(tmp_path)), include_defaults=False)
    results = lm_eval.simple_evaluate(
        "duo",
        model_args=f"pretrained={CHECKPOINTS / 'austen_ar/checkpoints'},progress=False,mode=full",
        tasks=["austen_cloze"],
        task_manager=manager,
        limit=2,
        batch_size=16,
        device="cpu",
        bootstrap_iters=0,
        use_cache=str(tmp_path / "cache"),
    )
    assert results["n-samples"]["austen_cloze"] == {"original": 500, "effective": 2}


def test_unknown_tasks_and_data_that_cannot_be_had(tmp_path):
    with pytest.raises(ValueError, match="tasks: given austen_close; allowed: austen_cloze, austen_rolling and those of lm-evaluation-harness"):
        evaluate(None, ["austen_close"], tmp_path)


def test_a_run(tmp_path):
    """`duo-run harness/…` writes its numbers, and refuses what cannot be before a kernel starts."""
    def duo_run(*words):
        return subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from duo.runs import main; sys.exit(main())",
                "harness/austen_cloze_ar",
                "--output",
                str(tmp_path / "out"),
                *words,
            ],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
    found = duo_run("tasks=", "limit=0")
    assert found.returncode == 2 and "limit: given 0; allowed: at least 1" in found.stderr + found.stdout and not (tmp_path / "out").exists(), found
    found = duo_run("limit=2")
    metrics = json.loads((tmp_path / "out/metrics.json").read_text()) if found.returncode == 0 else found
    assert metrics["loglikelihood_se"] == 0 and 0 <= metrics["austen_cloze_acc"] <= 1 and metrics["austen_rolling_bits_per_byte"] < 3, metrics
    assert len((tmp_path / "out/samples.jsonl").read_text().splitlines()) == 4
