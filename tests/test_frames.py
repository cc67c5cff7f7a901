"""The frame of a text (bos, text, eos) everywhere that a model reads or writes one, and the characters that numbers are said per."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from duo.data import CharTokenizer, SubwordTokenizer, characters, load_blocks, pack, pad, tokenizer
from duo.dit import DiT, DiTConfig
from duo.hub import Model, load, save
from duo.likelihood import METHODS, network_vocab
from duo.metrics import CausalLM, evaluate_bound

LETTERS = CharTokenizer("abcd<>\n", "letters")  # < and > around each text
BOS, EOS, BREAK = 4, 5, 6


def model(method, frame=(BOS, EOS), layout="packed", length=8, text=LETTERS):
    torch.manual_seed(0)
    net = DiT(DiTConfig(network_vocab(method, text.vocab_size), 32, 1, 2, 16, causal=method == "ar"))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Model(net, method, METHODS[method].schedule, text, length, frame=frame, layout=layout)


def seen_by(made):
    """What the network of a model reads from now on, a list of tokens (B, n)."""
    seen = []
    made.net.vocab_embed.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    return seen


@torch.no_grad()
def test_ar_reads_its_frame_once():
    ar = model("ar")
    ids = LETTERS.encode("abcabd")
    x = torch.tensor([BOS, *ids, EOS])
    log_p = ar.net(x[None, :-1])[0, :, : LETTERS.vocab_size].log_softmax(-1)
    by_hand = -log_p.gather(-1, x[1:, None]).sum()
    scores, whole = ar.nll(["abcabd"]), ar.nll(x[None])
    assert abs(scores.nats[0] - by_hand) < 1e-5 and scores.tokens[0] == 7 and scores.characters[0] == 6
    assert abs(whole.nats[0] - by_hand) < 1e-5 and whole.tokens[0] == 7 and whole.characters[0] == 6
    bound = evaluate_bound(ar.loss, pack(["abcabd" * 3], LETTERS, 8, frame=(BOS, EOS)), exact=True)
    assert bound.scores.tokens.tolist() == [7, 7, 7] and abs(bound.totals[0] - 3 * by_hand) < 1e-4
    seen = seen_by(ar)
    x = ar.sample_tokens(3, seed=0)
    assert x.shape == (3, 8) and (x[:, 0] == BOS).all() and seen[0].tolist() == [[BOS]] * 3
    seen.clear()
    x = ar.sample_tokens(2, prompt="ab", seed=0)
    assert x[:, :3].tolist() == [[BOS, 0, 1]] * 2 and seen[0].tolist() == [[BOS, 0, 1]] * 2
    assert torch.equal(ar.sample_tokens(2, prompt=(x[0], torch.arange(8) < 3), seed=0), ar.sample_tokens(2, prompt="ab", seed=0))
    with pytest.raises(ValueError, match="prompt: given a text that begins with token 0; allowed: 4"):
        ar.sample_tokens(1, prompt=(torch.tensor([0, 1]), torch.tensor([True, True])))


@pytest.mark.parametrize("method", ["duo", "mdlm"])
def test_diffusion_is_judged_and_prompted_in_its_frame(method):
    made = model(method)
    framed = torch.tensor([[BOS, *LETTERS.encode("abcd"), EOS]])
    scores = made.nll(["abcd"], draws=2000, seed=0)
    bound = evaluate_bound(made.loss, framed, 2000, exact=False, generator=torch.Generator().manual_seed(1)).per(1)
    assert abs(scores.nats[0] - bound.mean) < 4 * math.hypot(scores.nats_se[0], bound.se) and scores.tokens[0] == 6 and scores.characters[0] == 4
    assert made.nll(framed, seed=0).nats.tolist() == made.nll(["abcd"], seed=0).nats.tolist()
    assert made.nll(["abcdabcd"], seed=0).tokens[0] == 8 + 2 * 2 and made.nll(["abcdabcd"], seed=0, beyond="truncate").characters[0] == 6
    seen = seen_by(made)
    x = made.sample_tokens(3, steps=4, prompt="ab", seed=0)
    assert x.shape == (3, 8) and (x[:, :3] == torch.tensor([BOS, 0, 1])).all() and (x[:, -1] == EOS).all()
    assert all((part[:, 0] == BOS).all() and (part[:, -1] == EOS).all() for part in seen)
    assert all(text.startswith("ab") for text in made.sample(3, steps=4, prompt="ab", seed=0)) and all(text.endswith("ab") for text in made.sample(3, steps=4, prompt="{}ab", seed=0))
    seen.clear()
    x = made.sample_tokens(2, steps=2, length=20, seed=0)  # in strides, each in a frame
    assert x.shape == (2, 20) and (x[:, 0] == BOS).all() and (x[:, -1] == EOS).all() and all(part.shape[1] == 8 and (part[:, 0] == BOS).all() and (part[:, -1] == EOS).all() for part in seen)
    free = torch.full((8,), 0), torch.arange(8) == 3
    assert (made.sample_tokens(64, steps=2, prompt=free, seed=0)[:, 0] != BOS).any()  # a block of one's own is taken as it is


@pytest.mark.parametrize("method", ["duo", "mdlm", "gidd", "sedd_absorb", "d3pm"])
def test_the_noise_of_a_text_is_its_own(method):
    own = {"gidd": {"p_uniform": 0.2}, "d3pm": {"T": 8}}.get(method, {})
    made = model("duo") if method == "duo" else Model(model("mdlm").net, method, METHODS[method].schedule, LETTERS, 8, **own)
    texts = ["abcd", "abca", "dd", "abcdabcdabcd", "abcd"]
    whole = made.nll(texts, draws=4, batch_size=64, seed=3).nats
    assert torch.allclose(made.nll(texts, draws=4, batch_size=3, seed=3).nats, whole, atol=1e-4) and torch.allclose(made.nll(texts[::-1], draws=4, seed=3).nats.flip(0)[1:4], whole[1:4], atol=1e-4)
    assert torch.allclose(made.nll(["dd"], draws=4, seed=3).nats, whole[2:3], atol=1e-4) and not torch.allclose(made.nll(["dd"], draws=4, seed=4).nats, whole[2:3], atol=1e-4)
    assert whole[0] != whole[4]  # the same text twice is two draws, and one text: no error over texts is known
    assert math.isnan(made.nll(["dd"] * 9, seed=3).perplexity().se)


@pytest.mark.parametrize("method", ["duo", "ar"])
def test_a_padded_text_ends(method, tmp_path):
    made = model(method, (None, BREAK), "padded")
    x = made.sample_tokens(64, steps=4, seed=0)
    for row, text in zip(x.tolist(), made.text(x)):
        end = row.index(BREAK) if BREAK in row else 8
        assert set(row[end:]) <= {BREAK} and text == LETTERS.decode(row[:end])
    assert sum(BREAK in row for row in x.tolist()) > 8
    scores = made.nll(["ab", "abcdabcda"], seed=0)
    assert scores.tokens.tolist() == [3, 9 + 2] and scores.characters.tolist() == [2, 9]
    assert made.nll(torch.tensor([[0, 1, BREAK, BREAK, BREAK]]), seed=0).nats.tolist() == made.nll(["ab"], seed=0).nats.tolist()
    again = load(save(made, tmp_path))
    assert (again.frame, again.layout) == ((None, BREAK), "padded") and torch.equal(again.sample_tokens(64, steps=4, seed=0), x)


def test_frames_in_config_json(tmp_path):
    ar = model("ar")
    save(ar, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["frame"] == [BOS, EOS] and config["layout"] == "packed" and load(tmp_path).ends == (LETTERS.vocab_size, BOS)
    for key in ("frame", "layout"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path).frame is None and load(tmp_path).ends == (LETTERS.vocab_size,) * 2  # an old file
    for wrong in ([BOS], [BOS, 99], "ab", [BOS, None]):
        (tmp_path / "config.json").write_text(json.dumps(config | {"frame": wrong}))
        with pytest.raises(ValueError, match="config.json: frame: given"):
            load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"frame": None, "layout": "loose"}))
    with pytest.raises(ValueError, match="layout: given 'loose'; allowed: packed, padded"):
        load(tmp_path)


def test_an_old_file_had_the_frame_of_its_data(tmp_path):
    """What a config.json without the key means: the row of its data, behind the start token that an autoregressive network had."""
    gpt = with_symbols()
    for method in ("mdlm", "ar"):
        made = model(method, None, text=gpt)
        made.training = {"data": "openwebtext"}
        save(made, tmp_path / method)
        config = json.loads((tmp_path / method / "config.json").read_text())
        del config["frame"], config["layout"]
        (tmp_path / method / "config.json").write_text(json.dumps(config))
        old = load(tmp_path / method)
        assert old.frame == (gpt.bos_id, gpt.eos_id) and (method == "mdlm" or old.ends == (gpt.vocab_size,) * 2)


def with_symbols(name="gpt"):
    """Byte-level subword pieces with an end of text, which is special, and runs of blanks and a word, which are added but not special."""
    backend = type(tokenizer("bpe1024").backend).from_str(tokenizer("bpe1024").backend.to_str())
    backend.add_special_tokens(["<|endoftext|>"])
    backend.add_tokens(["    ", "        ", "naïveté"])
    end = backend.token_to_id("<|endoftext|>")
    return SubwordTokenizer(backend, name, end, end)


def pieces():
    """Word pieces as BERT's, with its five special symbols."""
    from tokenizers import BertWordPieceTokenizer, Tokenizer
    symbols = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.,()=", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"), "return", "def"]
    backend = Tokenizer.from_str(BertWordPieceTokenizer({s: i for i, s in enumerate(symbols)}, lowercase=True).to_str())
    return SubwordTokenizer(backend, "bert", 2, 3, 0)


CODE = "def f(x):\n    if x:\n        return naïveté(x)\n    return x, 2\n"


@pytest.mark.parametrize("make", [with_symbols, pieces, lambda: tokenizer("bpe1024"), lambda: tokenizer("text8"), lambda: CharTokenizer(sorted(set(CODE)), "code")], ids="added pieces bpe text8 char".split())
def test_one_definition_of_a_character(make):
    text = make()
    ids = text.encode(CODE)
    special = getattr(text, "special", [])
    want = len(text.decode([i for i in ids if i not in special]))
    assert characters([ids], text)[0] == want
    frame = (text.bos_id, text.eos_id) if text.eos_id is not None else ()
    blocks = pack([CODE] * 40, text, 16, frame=frame), pad([CODE], text, 200, frame)
    for made in blocks:
        inside = [[i for i in row.tolist() if i not in special] for row in made[:]]
        inside = [row[: len(ids)] for row in inside] if made.ends is not None else inside
        if text.name != "bert":  # whose word pieces may begin a block
            assert sum(made.chars) == len(text.decode(sum(inside, [])))
        assert made.chars.tolist() == [len(text.decode(row)) for row in inside] or text.name in ("gpt", "bpe1024")
    judged = model("ar", frame or None, length=200, text=text).nll([CODE])
    assert judged.characters[0] == want == blocks[1].n_chars
    if text.name in ("code", "bpe1024", "gpt"):
        assert want == len(CODE)
    bits = judged.bits_per_character().mean
    bound = evaluate_bound(model("ar", frame or None, length=200, text=text).loss, pad([CODE], text, len(ids) + len(frame), frame), exact=True)
    assert abs(bound.bits_per_character().mean - bits) < 1e-5  # as data and as text


def test_a_judge_counts_the_same_characters():
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    text = with_symbols()
    theirs = PreTrainedTokenizerFast(tokenizer_object=text.backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    judge = CausalLM(GPT2LMHeadModel(GPT2Config(vocab_size=text.vocab_size, n_positions=256, n_embd=16, n_layer=1, n_head=2)), theirs)
    for sample in (CODE, "<|endoftext|>" + CODE + "<|endoftext|>"):
        ids = text.encode(sample)
        assert judge.nll([sample]).characters[0] == characters([ids[1:]], text)[0]


def test_padded_documents_of_ones_own(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    texts = ["ab", "abc.", "b" * 20]
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    char, gpt = CharTokenizer("abc.\n", "small"), with_symbols()
    blocks = load_blocks(folder, "train", char, 8, layout="padded")
    assert blocks.frame == (None, 4) and blocks[:].tolist() == [[0, 1, 4, 4, 4, 4, 4, 4], [0, 1, 2, 3, 4, 4, 4, 4], [1] * 7 + [4]]
    assert blocks.mask.sum(1).tolist() == [3, 5, 8] and blocks.n_tokens == 16 and blocks.chars.tolist() == [2, 4, 7]
    assert np.allclose(blocks.more(np.arange(3))["weights"].numpy(), blocks.mask * 24 / 16)
    blocks = load_blocks(folder, "train", gpt, 8, layout="padded")
    assert blocks.frame == (None, gpt.eos_id) and all(row[sum(mask) - 1] == gpt.eos_id for row, mask in zip(blocks[:], blocks.mask))
    assert load_blocks(folder, "train", char, 8).frame == ()  # packed text of one's own has no frame
    made = model("duo", (None, 4), "padded", text=char)
    assert made.blocks(folder, "train").frame == (None, 4) and made.blocks(folder, "train").mask is not None and made.blocks(folder, "train", "packed").frame == ()
    assert replace(made, frame=None, layout="packed").blocks(folder, "train").ends is None
    with pytest.raises(ValueError, match="tokenizer 'text8', which has no symbol that ends a text"):
        load_blocks(folder, "train", tokenizer("text8"), 8, layout="padded")
    (folder / "train.jsonl").write_text(json.dumps({"text": "a\nb"}) + "\n")
    with pytest.raises(ValueError, match="padded for texts with a '\\\\n', which ends a text"):
        load_blocks(folder, "train", char, 8, layout="padded")


def test_padded_texts_teach_their_end():
    from duo.training import Training
    method = "ar"  # which learns it in a second
    texts = ["ab", "abcd", "dcb"]
    blocks = pad(texts, LETTERS, 8, (None, BREAK))
    module = Training(DiTConfig(network_vocab(method, 7), 32, 1, 2, 16, 0.0, causal=True), method, vocab_size=7, batch_size=48)
    optimizer, order = torch.optim.AdamW(module.net.parameters(), 1e-2), np.arange(48) % 3
    for _ in range(60):
        optimizer.zero_grad()
        module.nats(module.net, blocks[order], **blocks.more(order)).mean().backward()
        optimizer.step()
    made = Model(module.net, method, None, LETTERS, 8, frame=blocks.frame, layout="padded")
    x = made.sample_tokens(100, steps=64, seed=0)
    good = [text for row, text in zip(x.tolist(), made.text(x)) if text in texts and row == [*LETTERS.encode(text), *[BREAK] * (8 - len(text))]]
    print(f"{len(good)} of 100 are a text, its end and nothing else; {sorted(set(good))}")
    assert len(good) > 80 and set(good) == set(texts)
