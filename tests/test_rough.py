"""Rough input, generated here: texts and images as people have them, names that look like patterns, data that changes, stores and files that are damaged."""
import itertools
import json
import lzma
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from duo import content, data
from duo.content import look, table
from duo.data import Streamed, check_split, check_text, contents, documents, load_blocks, prepare, store_path, tokenizer
from duo.images import images, sides
from duo.parameters import RunError, plan
from duo.runs import main, run

ROOT = Path(__file__).resolve().parents[1]
WHO, DID, WHAT = (part.split("|") for part in ("A small boat|Her brother|My aunt|The old dog|Our teacher", "admired|carried|forgot|returned|sold", "the market.|some news.|a silver coin!|seven apples?|his umbrella."))
RUSSIAN = "Старый дом стоит у реки. Маленький мальчик читает книгу. Сегодня идёт дождь. "
SMALL = dict(hidden_size=8, n_blocks=1, n_heads=1, cond_dim=8, batch_size=4, device_batch_size=2, max_steps=2, curriculum_steps=1, warmup_steps=1, valid_every=1, valid_blocks=2, checkpoint_every=1)


def paragraphs(n, seed=0):
    """n paragraphs of five generated sentences."""
    rng = np.random.default_rng(seed)
    sentence = lambda: " ".join(part[rng.integers(5)] for part in (WHO, DID, WHAT))
    return [" ".join(sentence() for _ in range(5)) for _ in range(n)]


def texts():
    """name → bytes of a text file."""
    plain = "\n\n".join(paragraphs(220)) + "\n"
    short = "\n\n".join(map(" ".join, itertools.batched(paragraphs(190), 10))) if hasattr(itertools, "batched") else "\n\n".join(" ".join(paragraphs(10, i)) for i in range(19))
    return {"plain": plain.encode(), "crlf": plain.replace("\n", "\r\n").encode(), "bom": b"\xef\xbb\xbf" + plain.encode(), "emoji": plain.replace("apples", "🍏 “größer” 👩‍👧 –").encode(),
            "nul": plain.replace("market", "mar\0ket", 1).encode(), "utf16": plain.encode("utf-16"), "latin1": plain.replace("market", "café", 3).encode("latin-1"),
            "oneline": plain.replace("\n", " ").encode(), "tiny": b"A very small text. It has two sentences.\n", "russian": "\n\n".join([RUSSIAN * 3] * 200).encode(),
            "short_valid_paragraph": f"{short}\n\nThe end.\n".encode()}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    for name, text in texts().items():
        (folder / f"{name}.txt").write_bytes(text)
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(10), 20)
    x = (rng.integers(80, size=(200, 8, 8, 3)) + y[:, None, None, None] * 19).astype(np.uint8)
    forms = {"col": (x, y[:, None]), "onehot": (x, np.eye(10, dtype=int)[y]), "float": ((x / 255).astype(np.float32), y), "grey": (x[..., 0], y), "nchw": (np.moveaxis(x, -1, 1), y), "stry": (x, np.array([f"c{c}" for c in y])),
             "whole": (x.astype(float), y.astype(float)), "plain": (x, y), "neg": (x, np.where(y, y, -1)), "obj": (x, y.astype(object)), "signed": (x / 127.5 - 1, y), "nan": (x / np.nan, y), "few": (x[:2], y[:2]), "other": (x, y[:9]),
             "half": (x, y + 0.5), "two": (x, np.eye(10, dtype=int)[y] + np.eye(10, dtype=int)[0]), "huge": (x, y * 10**17)}
    for name, (pictures, labels) in forms.items():
        np.savez_compressed(folder / f"{name}.npz", x=pictures, y=labels)
    (folder / "cut.npz").write_bytes((folder / "plain.npz").read_bytes()[:9000])
    (folder / "empty.npz").write_bytes(b"")
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, archive.open("x.npy", "w", force_zip64=True) as entry:
        np.lib.format.write_array_header_1_0(entry, {"descr": "|u1", "fortran_order": False, "shape": (400_000, 32, 32, 3)})
        for _ in range(150):
            entry.write(bytes(8_192_000))
    np.save(folder / "array.npy", x)
    os.replace(folder / "array.npy", folder / "array.npz")
    return folder


@pytest.fixture
def at(tmp_path, monkeypatch):
    """A folder for the stores of a test."""
    monkeypatch.setenv("DUO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DUO_DATA", raising=False)
    return tmp_path


def door(target, **given):
    """The problems of a command at the door, which writes nothing."""
    try:
        plan(target, given)
        return []
    except RunError as error:
        assert error.status == 2 and all("\n" not in problem for problem in error.problems)
        return error.problems


@pytest.mark.parametrize("name", ["plain", "crlf", "bom", "emoji", "nul", "oneline", "russian", "short_valid_paragraph"])
def test_texts_that_train(name, cases, at):
    file = cases / f"{name}.txt"
    assert door("train/austen_duo", data=str(file), tokenizer="bpe1024", length=32) == [] and not (at / "cache").exists()
    parts = {split: list(documents(file, split)) for split in data.SPLITS}
    whole, found = texts()[name].decode("utf-8-sig"), "".join(map("".join, parts.values()))
    assert not {"\r", "\0", "\ufeff"} & {*found} and len(found) > 0.98 * len(whole.replace("\r", ""))
    if name in ("plain", "crlf", "bom", "nul"):
        assert parts == {split: list(documents(cases / "plain.txt", split)) for split in data.SPLITS}
    if name not in ("oneline", "short_valid_paragraph", "russian"):
        assert [len(part) for part in parts.values()] == [198, 11, 11]
    share = [sum(map(len, part)) / len(found) for part in parts.values()]
    assert 0.85 < share[0] < 0.95 and min(share[1:]) > 0.025
    assert all(len(load_blocks(file, split, "bpe1024", 32)) >= 5 for split in parts)


@pytest.mark.parametrize("name, given, words", [
    ("utf16", {}, "is no UTF-8 but UTF-16; allowed: UTF-8, which iconv -f UTF-16"), ("latin1", {}, "is no UTF-8 but Latin-1; allowed: UTF-8, which iconv -f LATIN1"), ("tiny", {}, "tokens do not fill one block of length=32"),
    ("russian", dict(tokenizer="text8"), "100% of its letters are none of a to z"), ("russian", dict(tokenizer="char"), "text has the character 'С'"), ("emoji", dict(tokenizer="char"), "text has the character"),
    ("plain", dict(length=4096), "length: given 4096; 812 tokens do not fill one block of length=4096")])
def test_texts_that_are_refused_at_the_door(name, given, words, cases, at):
    problems = door("train/austen_duo", data=str(cases / f"{name}.txt"), **{"tokenizer": "bpe1024", "length": 32, **given})
    assert problems and any(words in problem for problem in problems), problems
    assert not (at / "cache").exists()


def test_what_a_short_text_needs(cases, at):
    """The line says how much, and that much is enough."""
    problems = door("train/austen_duo", data=str(cases / "tiny.txt"), tokenizer="bpe1024", length=32)
    needed = max(int(problem.split("(")[-1].split(" bytes")[0].replace(",", "")) for problem in problems)
    (at / "enough.txt").write_text((" ".join(paragraphs(200)))[:needed])
    assert door("train/austen_duo", data=str(at / "enough.txt"), tokenizer="bpe1024", length=32) == []


def test_letters_that_text8_loses_are_said(at, capfd):
    (at / "mixed.txt").write_text("\n\n".join(f"{p} Über größere Äpfel." for p in paragraphs(220)))
    load_blocks(at / "mixed.txt", "train", "text8", 32)
    load_blocks(at / "mixed.txt", "train", "text8", 32)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2 and said[0] == said[1] and "2.8% of the letters are none of text8's" in said[0]


FORMS = {"col": 3, "onehot": 3, "float": 3, "grey": 1, "nchw": 3, "stry": 3, "whole": 3, "plain": 3}


@pytest.mark.parametrize("name", FORMS)
def test_images_whose_meaning_is_plain(name, cases):
    file = str(cases / f"{name}.npz")
    assert sides(file) == (FORMS[name], 8, 10)
    reference = images(cases / "plain.npz", "valid")
    for split, size in zip(data.SPLITS, (18, 1, 1)):
        found = images(file, split)
        assert np.bincount(found.labels).tolist() == [size] * 10  # sorted by class, and yet all classes are there
        assert found.classes == tuple(f"c{i}" if name == "stry" else str(i) for i in range(10))
        if split == "valid" and name != "grey":
            assert (found[:] == reference[:]).all() and (found.labels == reference.labels).all()
    assert door("train/twemoji_duo", data=file, length=64 * FORMS[name]) == []


@pytest.mark.parametrize("name, words", [
    ("neg", "has y from -1 to 9"), ("obj", "Object arrays cannot be loaded"), ("cut", "is not a file of numpy.savez"), ("empty", "is not a file of numpy.savez"), ("array", "is not a file of numpy.savez"), ("signed", "has x from -1.0 to 0.96"),
    ("nan", "has x from nan to nan"), ("few", "N at least 3"), ("other", "has y (9,)"), ("half", "has y from 0.5 to 9.5"), ("two", "has y (200, 10)"), ("huge", "below 65536"), ("bomb", "bytes when unpacked; allowed: 1,073,741,824")])
def test_images_that_are_refused_at_the_door(name, words, cases):
    for target in ("train/twemoji_duo", "fid/twemoji_duo"):
        problems = door(target, data=str(cases / f"{name}.npz"))
        assert len([problem for problem in problems if words in problem]) == 1, problems


def test_more_images_than_there_are(cases):
    assert any("n: given 11; allowed: up to the 10 images" in problem for problem in door("fid/twemoji_duo", data=str(cases / "plain.npz"), split="valid", n=11))


NAMES = ["a[1].txt", "a[2].txt", "a1.txt", "a*.txt", "a?.txt", "a,b.txt", "a=b.txt", "a b.txt", "a_b.txt", "{a,b}.txt", "!a.txt", "письмо.txt", "物語.txt", "über::x.txt", "a'\"$.txt", "-a.txt", "х" * 100 + ".txt"]


def test_no_name_is_a_pattern(at):
    """Each file is read, and no other; the same in folders of such names."""
    for i, name in enumerate(NAMES):
        (at / name).write_text("\n\n".join(f"{p} {i}" for p in paragraphs(40, i)))
        folder = at / f"in {name.removesuffix('.txt')}"
        folder.mkdir()
        for split in ("train", "valid"):
            (folder / f"{split}.txt").write_text("\n\n".join(f"{p} {i}" for p in paragraphs(40, i)))
            (folder / f"{split}-2[1]*.txt").write_text(f"the last {i}")
    for i, name in enumerate(NAMES):
        folder = at / f"in {name.removesuffix('.txt')}"
        expected = [f"{p} {i}" for p in paragraphs(40, i)]
        assert [*itertools.chain(*(documents(at / name, split) for split in data.SPLITS))] == expected, name
        assert sorted(documents(folder)) == sorted([*expected, f"the last {i}"]) == sorted(row["text"] for row in documents(folder, streaming=True)), name
    blocks = [load_blocks(at / name, "train", "bpe1024", 16)[:].tolist() for name in NAMES]
    assert len({json.dumps(b) for b in blocks}) == len(NAMES)


def test_names_at_the_command_line(at, cases, monkeypatch, capsys):
    """A word names the file that is there, commas or not; what is not there is a sweep."""
    monkeypatch.chdir(at)
    for name in ["a,b.txt", "a=b.txt", "a[1].txt", "a b.txt", "письмо.txt", "it's.txt"]:
        shutil.copy(cases / "plain.txt", at / name)
        jobs = plan("train/austen_duo", [f"data={name}", "tokenizer=bpe1024", "length=32"])
        assert [job.params["data"] for job in jobs] == [str(at / name)]
        again = plan("train/austen_duo", shlex.split(jobs[0].command)[2:])
        assert [job.params for job in again] == [job.params for job in jobs]
    assert door("train/austen_duo", data="c,d.txt") != []


def test_copies_whose_folder_is_no_pattern(at, monkeypatch):
    """The same for $DUO_DATA, of repositories and of text8."""
    from mirror import write_mirror

    for name in ("one[1]", "one*"):
        monkeypatch.setenv("DUO_DATA", str(write_mirror(at / name)))
        assert len(documents("wikitext2", "valid")) and len(documents("ptb", "valid")) and len("".join(documents("text8", "valid"))) == 5000


def same_stat(file, text):
    """Another text of the same size, under the same name, inode and date."""
    was = file.stat()
    with open(file, "r+b") as handle:
        handle.write(text)
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns, file.stat().st_ino) == (was.st_size, was.st_mtime_ns, was.st_ino)


@pytest.mark.parametrize("large", [1 << 26, 1])
def test_a_text_is_known_by_its_content(large, at, monkeypatch):
    """Replaced under the same name, size and date, or behind a link: seen at once, in files, folders and streams, small and large; under another name it is the same."""
    monkeypatch.setattr(content, "LARGE", large)
    monkeypatch.setattr(content, "_READ", min(large, 1 << 20))
    for split in ("train", "valid"):
        (at / f"{split}.txt").write_text("\n\n".join(paragraphs(40)))
    (at / "link.txt").symlink_to(at / "train.txt")
    time.sleep(0.02)  # a tick of the file system's clock
    before = [load_blocks(path, "train", "bpe1024", 16)[:].tolist() for path in (at, at / "train.txt", at / "link.txt")]
    assert before[1] == before[2] and len(list((at / "cache").glob("*/store.json"))) == 2
    first, was = Streamed(at, "train", tokenizer("bpe1024"), 16, 4), contents(at, ["train", "valid"])
    batch = first.batch(0)
    (at / "other.txt").write_text("\n\n".join(paragraphs(40, 1)))
    os.unlink(at / "link.txt")
    (at / "link.txt").symlink_to(at / "other.txt")
    same_stat(at / "train.txt", (at / "train.txt").read_bytes().replace(b"the", b"THE"))
    after = [load_blocks(path, "train", "bpe1024", 16)[:].tolist() for path in (at, at / "train.txt", at / "link.txt")]
    assert all(a != b for a, b in zip(after, before)) and "THE" in "".join(documents(at / "train.txt"))
    second = Streamed(at, "train", tokenizer("bpe1024"), 16, 4)
    assert second.folder != first.folder and second.batch(0).tolist() != batch.tolist()
    now = contents(at, ["train", "valid"])
    assert now["train"] != was["train"] and now["valid"] == was["valid"]


def test_a_resume_on_another_text_is_refused(at, cases, capsys):
    file = at / "text.txt"
    shutil.copy(cases / "plain.txt", file)
    given = SMALL | dict(data=str(file), tokenizer="bpe1024", length=16, output=at / "run")
    run("train/austen_duo", **given)
    kept = {path: path.stat().st_mtime_ns for path in (at / "run").rglob("*") if path.is_file()}
    same_stat(file, file.read_bytes().replace(b"market", b"MARKET"))
    with pytest.raises(RunError) as error:
        run("train/austen_duo", **given)
    assert error.value.status == 2 and len(error.value.problems) == 1 and "was trained on another text" in error.value.problems[0] and "(train, valid)" in error.value.problems[0]
    assert kept == {path: path.stat().st_mtime_ns for path in (at / "run").rglob("*") if path.is_file()}
    same_stat(file, file.read_bytes().replace(b"MARKET", b"market"))
    words = [f"{key}={value}" for key, value in given.items() if key != "output"]
    assert main(["train/austen_duo", *words, "--output", str(given["output"]), "--dry-run"]) == 0 and "goes on" in capsys.readouterr().out


DAMAGES = {"cut": lambda b: b[:-2], "longer": lambda b: b + b"\0\0", "zeroed": lambda b: bytes(len(b)), "empty": lambda b: b"", "flipped": lambda b: b[:30] + bytes([b[30] ^ 1]) + b[31:], "out of range": lambda b: b"\xff\xff" + b[2:]}


@pytest.mark.parametrize("large", [1 << 26, 1])
def test_a_damaged_store_is_one_line(large, at, cases, monkeypatch):
    monkeypatch.setattr(content, "LARGE", large)
    monkeypatch.setattr(content, "_READ", min(large, 1 << 20))
    folder = prepare(cases / "plain.txt", "train", tokenizer("bpe1024"), workers=1)
    load = lambda: load_blocks(cases / "plain.txt", "train", "bpe1024", 16, separator="")
    whole, expected = {name: (folder / name).read_bytes() for name in ("tokens.bin", "ends.bin", "store.json")}, load()[:].tolist()
    for name, damage in itertools.product(whole, DAMAGES.values()):
        (folder / name).write_bytes(damage(whole[name]))
        with pytest.raises(ValueError, match=f"{name}' is damaged: .* remove '.*', which is then made again") as error:
            load()
        assert "\n" not in str(error.value)
        (folder / name).write_bytes(whole[name])
    assert load()[:].tolist() == expected
    (folder / "ends.bin").unlink()
    with pytest.raises(ValueError, match="is damaged"):
        load()
    shutil.rmtree(folder)
    assert load()[:].tolist() == expected


@pytest.mark.parametrize("which", ["parts", "plan.json"])
def test_damaged_parts_are_made_again(which, at, cases, monkeypatch):
    """An interrupted preparation whose parts were cut, zeroed or flipped ends with the same bytes; what was whole is kept."""
    file, tok = cases / "plain.txt", tokenizer("bpe1024")
    folder = prepare(file, "train", tok, workers=1)
    whole = [(folder / name).read_bytes() for name in ("tokens.bin", "ends.bin")]
    shutil.rmtree(folder)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(file, "train", tok, workers=1)
    parts = [path for path in sorted((folder / "parts").iterdir()) if (path.name == "plan.json") == (which == "plan.json")]
    assert len(parts) == (1 if which == "plan.json" else 3 * 4)
    for path, damage in zip(parts, itertools.cycle(DAMAGES.values())):
        path.write_bytes(damage(path.read_bytes()))
    assert prepare(file, "train", tok, workers=1) == folder and [(folder / name).read_bytes() for name in ("tokens.bin", "ends.bin")] == whole


def test_damaged_segments_of_a_stream(at):
    """A segment is made again to the same tokens; a damaged index, or other text behind it, is one line."""
    (at / "train.txt").write_text("\n\n".join(paragraphs(300)))
    make = lambda: Streamed(at, "train", tokenizer("bpe1024"), 16, 8, segment=50)
    stream = make()
    steps = [stream.batch(step) for step in range(3)]
    stream._ahead.shutdown()
    for damage in DAMAGES.values():
        for file in stream.folder.glob("*.tokens"):
            file.write_bytes(damage(file.read_bytes()))
        again = make()
        assert all((again.batch(step) == steps[step]).all() for step in range(3))
        again._ahead.shutdown()
    index = stream.folder / "index.json"
    kept = index.read_text()
    index.write_text(kept.replace('"end": false', '"end": true') if '"end": false' in kept else kept.replace("1", "2", 1))
    with pytest.raises(ValueError, match="index.json' is damaged"):
        make().batch(0)
    index.write_text(kept)
    for file in stream.folder.glob("*.tokens"):
        file.unlink()
    other = make()
    other.rows.files = [str(at / "other.txt")]
    (at / "other.txt").write_text("\n\n".join(paragraphs(300, 1)))
    with pytest.raises(ValueError, match="segment 0 of the stream has other text than before"):
        other.batch(0)


WORKERS = """
import sys, time
from duo import data
tok = data.CharTokenizer(data.AUSTEN_ALPHABET)
encode = tok.encode_batch
tok.encode_batch = lambda texts: (time.sleep(0.2), encode(texts))[1]
data.prepare(sys.argv[1], "train", tok, workers=2)
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_no_worker_outlives_a_killed_preparation(at):
    (at / "train.txt").write_text("\n\n".join(f"document {i}" for i in range(5000)))
    process = subprocess.Popen([sys.executable, "-c", WORKERS, str(at)], cwd=ROOT, start_new_session=True)
    children, until = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.time() + 60
    while not list((at / "cache").glob("*/parts/*.tokens")) and time.time() < until:
        time.sleep(0.05)
    workers = children.read_text().split()
    assert len(workers) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    alive = lambda pid: Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    until = time.time() + 10
    while any(map(alive, workers)) and time.time() < until:
        time.sleep(0.05)
    assert not any(map(alive, workers))
    subprocess.run([sys.executable, "-c", WORKERS.replace("0.2", "0"), str(at)], cwd=ROOT, check=True, timeout=60)  # no lock is left


def test_a_long_line_takes_no_memory(at):
    """A line of 200 MB is refused after a bounded part of it; a nest, and nulls, do not take the process down."""
    with open(at / "long.jsonl", "wb") as file:
        file.write(b'{"text": "')
        for _ in range(200):
            file.write(b"a" * 1_000_000)
        file.write(b'"}\n')
    (at / "deep.jsonl").write_bytes(b'{"text": ' + b"[" * 10**6 + b"]" * 10**6 + b"}\n")
    (at / "nulls.jsonl").write_text("null\n" * 1000)
    code = """
import resource, sys
from duo.content import look
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for file in sys.argv[1:]:
    try:
        look([file])
    except ValueError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code, *(str(at / f"{name}.jsonl") for name in ("long", "deep", "nulls"))], cwd=ROOT, capture_output=True, text=True, check=True)
    *lines, grown = done.stdout.splitlines()
    assert ["more than 64 MB" in lines[0], "nested too deep" in lines[1], "holds null" in lines[2], len(lines)] == [True, True, True, 3] and int(grown) < 200


def test_random_damage_ends_in_one_line(at, cases):
    """1,200 files with flipped, cut, doubled and inserted bytes: read, or one line; nothing else."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "".join(json.dumps({"text": p, "id": i}) + "\n" for i, p in enumerate(paragraphs(12))).encode()
    pq.write_table(pa.table({"text": paragraphs(12)}), at / "rows.parquet")
    np.savez_compressed(at / "small.npz", x=np.zeros((20, 2, 2, 3), np.uint8), y=np.arange(20) % 2)
    kinds = {".txt": texts()["emoji"][:4000], ".jsonl": lines, ".jsonl.xz": lzma.compress(lines), ".parquet": (at / "rows.parquet").read_bytes(), ".npz": (at / "small.npz").read_bytes()}
    rng, ends = np.random.default_rng(0), {"read": 0, "refused": 0}
    for i, (kind, whole) in itertools.product(range(240), kinds.items()):
        a, b = sorted(rng.integers(len(whole), size=2))
        changed = [whole[:a] + bytes([whole[a] ^ 1 << rng.integers(8)]) + whole[a + 1:], whole[:a], whole[:b] + whole[a:], whole[:a] + rng.bytes(9) + whole[b:]][i % 4]
        file = at / f"x{kind}"
        file.write_bytes(changed)
        try:
            images(file, "valid") if kind == ".npz" else (look([file]), table([file]))
            ends["read"] += 1
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 600, (kind, i)
            ends["refused"] += 1
    assert ends["refused"] > 400 < ends["read"] + 300, ends


def test_a_cache_that_cannot_be_written_is_named(at, monkeypatch, cases):
    (at / "file").write_text("")
    monkeypatch.setenv("DUO_CACHE", str(at / "file/cache"))
    with pytest.raises(ValueError, match="DUO_CACHE: '.*file/cache' cannot be written"):
        load_blocks(cases / "plain.txt", "train", "bpe1024", 16)
    monkeypatch.setenv("DUO_CACHE", str(at / "full"))
    monkeypatch.setattr(data, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ValueError, match="DUO_CACHE: '.*full' cannot be written .No space left on device."):
        prepare(cases / "plain.txt", "train", tokenizer("bpe1024"), workers=1)


def test_short_parts_of_the_package(at):
    """Lengths beyond the validation text are known at the door for the package's own data too."""
    assert any("length: given 1000000; 466759 tokens do not fill" in problem for problem in door("train/austen_duo", tokenizer="char", length=10**6))
    check_text("austen", "valid", tokenizer("char"), 466_759)
    check_split("austen", "valid")
