"""From puzzles to a share of solved ones by the commands, and what these refuse."""
import contextlib
import io
import json
import random
from pathlib import Path

import pytest
import torch

from duo import hub, runs
from duo.data import load_blocks, tokenizer
from duo.sudoku import Boxes, decode, encode, solutions, solved, wilson

ROOT = Path(__file__).resolve().parents[1]
TINY = "hidden_size=32 n_blocks=1 n_heads=2 cond_dim=16 max_steps=6 warmup_steps=1 valid_every=3 valid_blocks=4 checkpoint_every=3 batch_size=4".split()


def command(*words):
    """(status, standard error) of duo-run."""
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        status = runs.main(list(words))
    return status, errors.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small set of puzzles."""
    path = tmp_path_factory.mktemp("puzzles")
    status, errors = command("puzzles/sudoku6", "train=12", "test=3", "copies=4", "--output", str(path))
    assert status == 0, errors
    return path


@pytest.mark.parametrize("method, layout, more", [("duo", "infill", ["curriculum_steps=3", "device_batch_size=2"]), ("ar", "prompt", [])])
def test_from_puzzles_to_a_share(folder, method, layout, more):
    out, where = folder / method, [f"data={folder / layout}", "--output"]
    status, errors = command(f"train/sudoku6_{method}", f"tokenizer={folder}", *TINY, *more, *where, str(out))
    assert status == 0, errors
    status, errors = command(f"solve/sudoku6_{method}", f"checkpoint={out}/checkpoints", *(["steps=1,3"] if method == "duo" else []), *where, str(out / "solve"))
    assert status == 0, errors
    assert json.loads((out / "checkpoints/config.json").read_text())["token_sigma"] == (method == "duo")
    rows = json.loads((out / "solve/metrics.json").read_text())["rows"]
    assert [(r["level"], r["calls"]) for r in rows] == [(level, calls) for calls in ((1, 3) if method == "duo" else (36,)) for level in ("easy", "medium", "hard")]
    assert all(0 <= r["low"] <= r["solved"] <= r["high"] <= 1 and r["n"] == 3 for r in rows)
    answers = [json.loads(line) for line in (out / "solve/samples.jsonl").read_text().splitlines()]
    assert len(answers) == 3 * len(rows)
    for answer in answers:
        assert answer["solved"] == solved(answer["puzzle"], answer["text"], Boxes(2, 3)) == ([decode(answer["text"], Boxes(2, 3))] == list(solutions(decode(answer["puzzle"], Boxes(2, 3)), Boxes(2, 3)))
                                                                                            if set(answer["text"]) <= set("123456") else False)
        if method == "duo":
            assert all(clue in (".", symbol) for clue, symbol in zip(answer["puzzle"], answer["text"]))  # clues are never touched


def test_clamped_tokens_survive_every_call(folder):
    tok = tokenizer(folder)
    blocks = load_blocks(str(folder / "infill"), "test", tok, 36)
    tokens, fixed = blocks[:], blocks.more(range(len(blocks)))["fixed"]
    from duo.dit import DiT, DiTConfig
    from duo.likelihood import METHODS, network_vocab
    for method in ("duo", "mdlm"):
        net = DiT(DiTConfig(network_vocab(method, tok.vocab_size), 32, 1, 2, 16, token_sigma=True))
        model = hub.Model(net, method, METHODS[method].schedule, tok, 36)
        seen, levels, hidden = [], [], net.hidden
        net.hidden = lambda x, sigma: levels.append(sigma) or hidden(x, sigma)
        x = model.sample_tokens(len(tokens), steps=4, prompt=(tokens, fixed), seed=0, callback=lambda step, xt, logits: seen.append(xt))
        assert seen and all(torch.equal(xt[fixed], tokens[fixed]) for xt in [*seen, x])
        assert len(levels) == 4 and all(((sigma == 0) == fixed).all() for sigma in levels)  # the network is told which tokens are given


def test_a_grader_that_knows_nothing_of_the_solution():
    """On every wrong symbol in every cell, and on grids made by chance."""
    boxes, draw = Boxes(2, 2), random.Random(0)
    solution = next(solutions([0] * 16, boxes))
    puzzle = encode([v if draw.random() < 0.5 else 0 for v in solution])
    assert solved(puzzle, encode(solution), boxes)
    for cell in range(16):
        for symbol in "1234.=":
            answer = encode(solution)[:cell] + symbol + encode(solution)[cell + 1:]
            assert solved(puzzle, answer, boxes) == (answer == encode(solution))
    every = {encode(grid) for grid in solutions([0] * 16, boxes)}
    for _ in range(2000):
        answer = "".join(draw.choice("1234") for _ in range(16))
        assert solved("." * 16, answer, boxes) == (answer in every)
    assert all(solved("." * 16, answer, boxes) for answer in every) and len(every) == 288
    assert wilson(0, 50)[0] == 0 < wilson(0, 50)[1] and wilson(50, 50)[1] == 1 > wilson(50, 50)[0]


REFUSED = [
    ("puzzles/sudoku6", ["box_rows=5", "box_columns=4"], "box_rows: given 5 x 4 cells in a box; allowed: from 5, below which no puzzle is hard, to 12, above which a puzzle takes minutes to find"),
    ("puzzles/sudoku6", ["copies=0"], "copies: given 0; allowed: at least 1"),
    ("train/sudoku6_duo", ["length=30"], "line 1 has 36 tokens; allowed: length=30"),
    ("train/sudoku6_ar", ["length=36", "data={folder}/prompt"], "line 1 has 73 tokens; allowed: length=36"),
    ("train/sudoku6_ar", ["length=36", "data={folder}/infill"], "method: given ar"),
    ("train/sudoku6_ar", ["tokenizer=char", "data={folder}/prompt"], "text has the character '='"),
    ("train/sudoku6_duo", ["streaming=true"], "streaming: given true for conditional data"),
    ("train/sudoku6_duo", ["data={folder}/broken"], "line 1 has no text in the field 'text'"),
    ("likelihood/austen_duo", ["data={folder}/infill"], "which is conditional; allowed: text"),
    ("solve/sudoku6_duo", ["box_rows=3", "checkpoint={folder}/model"], "allowed: one of tokenizer sudoku9"),
    ("solve/sudoku6_duo", ["data={folder}", "checkpoint={folder}/model"], "has no test.txt"),
    ("solve/sudoku6_duo", ["tail=greedy", "steps=0", "checkpoint={folder}/model"], "steps: given [0]; allowed: at least 1"),
]


@pytest.mark.parametrize("target, words, expected", REFUSED)
def test_refused_before_a_kernel_starts(folder, tmp_path, target, words, expected):
    if not (folder / "model").exists():
        from duo.dit import DiT, DiTConfig
        from duo.likelihood import METHODS
        hub.save(hub.Model(DiT(DiTConfig(8, 32, 1, 2, 16)), "duo", METHODS["duo"].schedule, tokenizer(folder), 36), folder / "model")
        (folder / "broken").mkdir()
        for split in ("train", "valid"):
            (folder / "broken" / f"{split}.jsonl").write_text('{"known": "1..4", "answer": "1234"}\n')
    where = {"train/sudoku6_duo": [f"data={folder}/infill", f"tokenizer={folder}"], "train/sudoku6_ar": [f"tokenizer={folder}"], "solve/sudoku6_duo": [f"data={folder}/infill"]}
    words = [word.replace("{folder}", str(folder)) for word in words]
    given = [word for word in where.get(target, []) if word.split("=")[0] not in {w.split("=")[0] for w in words}]
    tiny = [*TINY, *(["curriculum_steps=0"] if "duo" in target else [])] if target.startswith("train") else []
    status, errors = command(target, *given, *tiny, *words, "--output", str(tmp_path / "out"))
    assert status == 2 and expected in errors and not (tmp_path / "out").exists(), errors
    assert len(errors.strip().splitlines()) == 1, errors
