"""Every parameter file on its real notebook, two steps at tiny sizes, one after the other in this process.

    python tests/smoke.py [--part I/N] [--write FILE] [VERB/NAME ...]     default: all of parameters/, in the order in which they need each other

Papermill's own functions put the parameters into the notebook; its cells are then executed here, in a namespace of their own, where `duo-run VERB/NAME --smoke` starts a kernel
for each. What the files take from the network comes from tests/mirror.py. A line for each file: processor seconds, and a number of its metrics.json.
"""
import contextlib
import csv
import io
import os
import resource
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SKIPPED = {"demo/austen": "starts twenty other runs, each of which is here; its own smoke setting is run by nbdev_test"}
KEYS = "bits_per fid fd_ perplexity acc solved nats tokens entropy ms seconds".split()  # what a line shows: the first number whose name has one of these


def numbers(value, name=""):
    """(name, number) of every number in a nested value."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(item, (dict, list)):
            yield from numbers(item, key if isinstance(key, str) else name)
        elif isinstance(item, (int, float)) and not isinstance(item, bool):
            yield str(key if isinstance(key, str) else name), item


def shown(metrics):
    """The number of a run that its line shows, with its name; (None, None) where it has none."""
    found = [pair for pair in numbers(metrics) if not pair[0].endswith("_se")]
    return next((pair for word in KEYS for pair in found if word in pair[0]), found[0] if found else (None, None))


def spent():
    """Processor seconds of this process and of those that it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def execute(job):
    """Runs the cells of a job's notebook here, with its parameters as papermill injects them; returns the run's metrics."""
    import matplotlib.pyplot as plt
    import torch
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    from duo.runs import Run
    job.folder.mkdir(parents=True, exist_ok=True)
    notebook = parameterize_notebook(load_notebook_node(str(job.notebook)), job.params | {"output": str(job.folder)})
    space, threads, here = {"__name__": "__main__"}, torch.get_num_threads(), Path.cwd()
    try:
        for i, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
            exec(compile(cell.source, f"{job.target}, code cell {i}", "exec"), space)
    except SystemExit as end:  # a notebook that is done before its last cell, as papermill sees it
        if end.code:
            raise
    finally:
        plt.close("all")
        torch.set_num_threads(threads)
        os.chdir(here)
    return Run(job.folder).metrics() or {"rows": Run(job.folder).curve()}


def smoke(targets, folder, show=print):
    """Rows {run, seconds, what, value} of the smoke runs of `targets`, and of those that they need, with results in `folder`; a row that failed has `error`."""
    from duo.parameters import needed, plan
    order = list(dict.fromkeys(run for target in targets for run in needed(target, ROOT)))
    os.environ["DUO_OUTPUTS"], rows = str(folder), []
    for target in order:
        if target in SKIPPED:
            rows.append({"run": target, "skipped": SKIPPED[target]})
            show(f"{target:34} skipped: {SKIPPED[target]}")
            continue
        start, said = spent(), io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                job, = plan(target, root=ROOT, smoke=True)
                metrics = execute(job)
            what, value = shown(metrics)
            rows.append({"run": target, "seconds": round(spent() - start, 2), "what": what, "value": value})
            show(f"{target:34} {rows[-1]['seconds']:6.2f} s  {what} {value if value is None else format(value, '.4g')}")
        except (Exception, SystemExit) as error:
            rows.append({"run": target, "seconds": round(spent() - start, 2), "error": f"{type(error).__name__}: {error}"})
            show(f"{target:34} FAILED {rows[-1]['error']}\n{said.getvalue()[-1500:]}\n{traceback.format_exc()[-2500:]}")
    return rows


def parts(n):
    """All targets in n lists of about the same length, such that what one needs is in the same list."""
    from duo.parameters import needed, targets
    groups = []
    for target in targets(ROOT):
        group = set(needed(target, ROOT))
        for other in [g for g in groups if g & group]:
            group |= other
            groups.remove(other)
        groups.append(group)
    lists = [[] for _ in range(n)]
    for group in sorted(groups, key=lambda g: (-len(g), min(g))):
        min(lists, key=len).extend(sorted(group))
    return lists


def environment(folder):
    """Writes the copies of everything that is fetched, and names them in the variables that the libraries read; before any of these is imported."""
    os.environ |= {"DUO_DATA": f"{folder}/data", "DUO_CACHE": f"{folder}/cache", "HF_HUB_CACHE": f"{folder}/data/hub", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{folder}/datasets",
                   "MPLBACKEND": "agg", "TOKENIZERS_PARALLELISM": "false"}
    import mirror
    for write in (mirror.write_mirror, mirror.write_tasks, mirror.write_cifar10):
        write(f"{folder}/data")
    mirror.write_hub(f"{folder}/data/hub")


def main(words):
    """Runs what is asked for; returns the exit status."""
    part, file = ((words.pop(words.index(o) + 1), words.remove(o))[0] if o in words else None for o in ("--part", "--write"))
    folder = tempfile.mkdtemp()
    try:
        environment(folder)
        i, n = map(int, (part or "1/1").split("/"))
        rows = smoke(words or parts(n)[i - 1], f"{folder}/outputs", lambda line: print(line, flush=True))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if file:
        with open(file, "w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, ("run", "seconds", "what", "value", "skipped", "error"), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    failed = [row["run"] for row in rows if "error" in row]
    print(f"{len(rows)} files, {sum(row.get('seconds', 0) for row in rows):.0f} s, {len(failed)} failed {' '.join(failed)}".rstrip())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
