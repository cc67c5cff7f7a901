"""Files that are damaged, hostile, of others or not finite: the same numbers, or one line."""
import json
import random
import shutil
import time
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from duo.data import tokenizer
from duo.dit import DiT, DiTConfig
from duo.hub import Model, examine, load, read_checkpoint, save
from duo.schedules import LogLinear
from duo.training import AtomicCheckpoints, Training
from test_hub import gpt2_like, known, lightning


def model(seed=0):
    torch.manual_seed(seed)
    net = DiT(DiTConfig(81, 32, 1, 2, 16))
    torch.nn.init.normal_(net.head.weight)
    return Model(net, "duo", LogLinear(), tokenizer("char"), 16)


def line(call, *names):
    """The one line of the ValueError of `call`, which says all of `names` and prints no control character."""
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and text.isprintable() and len(text) < 1000, text
    assert all(name in text for name in names), text
    return text


def same(found, other):
    return all(torch.equal(a, b) for a, b in zip(found.net.state_dict().values(), other.net.state_dict().values(), strict=True))


def damaged(path, number, draw):
    """Copies of a file's bytes: flipped bits, bytes replaced, cut short, zeroed."""
    whole = path.read_bytes()
    for i in range(number):
        at, kind = draw.randrange(len(whole)), i % 4
        piece = (bytes([whole[at] ^ 1 << draw.randrange(8)]), bytes([draw.randrange(256)]), b"", bytes(len(whole[at:at + 64])))[kind]
        yield whole[:at] + (b"" if kind == 2 else piece + whole[at + len(piece):])


def test_damaged_weights_are_refused_or_the_same(tmp_path):
    ours, draw, refused = model(), random.Random(0), 0
    save(ours, tmp_path)
    module = Training(ours.net.config, "duo", vocab_size=81, schedule=LogLinear())
    module.ema.load_state_dict(ours.net.state_dict())
    for path in (tmp_path / "model.safetensors", tmp_path / "last.ckpt"):
        if path.suffix == ".ckpt":
            (tmp_path / "model.safetensors").unlink()
            AtomicCheckpoints().save_checkpoint({"state_dict": module.state_dict(), "global_step": 3}, path)
        whole = path.read_bytes()
        for content in damaged(path, 120, draw):
            path.write_bytes(content)
            try:
                assert same(load(tmp_path), ours), path
            except ValueError as error:
                assert len(str(error).splitlines()) == 1 and path.name in str(error)
                refused += 1
        path.write_bytes(whole)
        assert same(load(tmp_path), ours)
    assert refused > 200


def test_numbers_that_are_not_finite(tmp_path):
    wrong, weight = model(), torch.nn.Parameter(torch.full((81, 32), 1e5))
    wrong.net.head.weight = weight
    line(lambda: save(wrong, tmp_path / "half", dtype=torch.float16), "float16", "65,504", "output_layer.linear.weight", "bfloat16")
    assert not (tmp_path / "half").exists() or not [*(tmp_path / "half").iterdir()]
    save(wrong, tmp_path / "half", dtype=torch.bfloat16)
    weight.data[3, 4] = torch.nan
    line(lambda: save(wrong, tmp_path / "nan"), "not finite", "output_layer.linear.weight")
    line(lambda: save(model(), tmp_path / "nan", raw=wrong.net), "not finite", "output_layer.linear.weight")
    save(model(), tmp_path / "there")
    save_file(wrong.net.state_dict(), tmp_path / "there/model.safetensors")
    line(lambda: load(tmp_path / "there"), "model.safetensors", "not finite", "output_layer.linear.weight")
    state, _ = known("dit")
    state["blocks.0.attn_out.weight"][0, 0] = torch.inf
    line(lambda: load(lightning(tmp_path / "x.ckpt", state, "duo", gpt2_like(tmp_path))), "x.ckpt", "not finite", "blocks.0.attn_out.weight")


def test_small_files_that_ask_for_much(tmp_path):
    path, began = tmp_path / "x.ckpt", time.time()
    bomb = []
    for _ in range(60):
        bomb = [bomb, bomb]
    rows = [{"a": 1}]
    for _ in range(40):
        rows = {"x": rows, "y": rows, "z": (rows, rows)}
    names = ()
    for _ in range(60):
        names = (names, names)
    ring = [1]
    ring.append(ring)
    big = torch.zeros(1).expand(10**9)
    many = torch.zeros(10**5)
    for content in ({"state_dict": bomb}, {"hyper_parameters": rows}, {"a": ring}, {"a": {1: names}}, {"a": [names]}, {"state_dict": {"a": big}}, {"a": [many] * 10**4},
                    {"state_dict": {str(i): big for i in range(5)}}, {"a": torch.eye(3).to_sparse()}):
        torch.save(content, path)
        line(lambda: load(path), "x.ckpt")
        line(lambda: examine(path), "x.ckpt")
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))  # a tuple of twice the tuple before, sixty times: to hash it is 2⁶⁰ steps
    with zipfile.ZipFile(path, "w") as archive:
        for part, content in parts.items():
            archive.writestr(part, b"\x80\x02})q\x00" + name + b"K\x01s." if part.endswith("data.pkl") else content)
    line(lambda: load(path), "shared tuples")
    for kind, size in ((zipfile.ZIP_DEFLATED, 10**8), (zipfile.ZIP_BZIP2, 10**6), (zipfile.ZIP_LZMA, 10**6)):
        with zipfile.ZipFile(path, "w", kind) as archive:
            archive.writestr("x/data.pkl", bytes(size))
        line(lambda: load(path), "compressed")
        line(lambda: examine(path), "compressed")
    assert time.time() - began < 20


OTHERS = (None, 3, -1, 0, 2.5, float("nan"), "text\n\x1b[31m", b"bytes", [], [1], (), {}, {1: 2}, {"a": 1}, {"a": [1]}, True, torch.ones(2), torch.tensor(1), torch.zeros(0), {"w": torch.ones(2)}, 10**30, "x" * 5000, [torch.ones(1)])


def test_structures_of_other_types(tmp_path):
    """Each part of a .ckpt replaced by things of other types: loads, or one line."""
    state, _ = known("dit")
    whole, path, loaded = read_checkpoint(lightning(tmp_path / "whole.ckpt", state, "duo", gpt2_like(tmp_path))), tmp_path / "x.ckpt", 0
    places = [("state_dict",), ("ema",), ("ema", "shadow_params"), ("hyper_parameters",), ("global_step",), ("state_dict", "backbone.vocab_embed.embedding"), ("state_dict", "backbone.rotary_emb.inv_freq"),
              ("state_dict", "backbone.output_layer.adaLN_modulation.weight"), *[("hyper_parameters", *place) for place in
               [("algo",), ("algo", "name"), ("algo", "time_conditioning"), ("model",), ("model", "length"), ("model", "n_heads"), ("model", "dropout"), ("noise",), ("noise", "type"), ("noise", "eps"), ("data",)]]]

    def replaced(tree, place, value):
        return value if not place else {**tree, place[0]: replaced(tree[place[0]], place[1:], value)}

    assert load(tmp_path / "whole.ckpt").length == 6
    for place in places:
        for other in OTHERS:
            torch.save(replaced(whole, place, other), path)
            for read in (load, examine):
                try:
                    loaded += read(path) is not None
                except ValueError as error:
                    text = str(error)
                    assert len(text.splitlines()) == 1 and text.isprintable() and len(text) < 1000, (place, other, text)
    for other in OTHERS:
        torch.save(other, path)
        line(lambda: load(path), "x.ckpt")
    assert 30 < loaded < 200


def test_config_of_sizes_and_types(tmp_path):
    """Each field of config.json replaced: what does not fit the tensors is refused at once, in one line."""
    save(model(), tmp_path)
    config, began, loaded = json.loads((tmp_path / "config.json").read_text()), time.time(), 0
    values = (None, True, 0, -1, 10**9, 10**12, 10**30, 1e300, float("nan"), "a\n\x1b[0m", "x" * 9999, [], [10**9], {}, {"a": {}})
    for name in [*config, "mask_id", "bos_id", "p_uniform", "T", "network", "token_sigma", "new\n"]:
        for value in values:
            (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
            for read in (load, examine):
                try:
                    read(tmp_path)
                    assert name not in ("length", "n_blocks", "hidden_size", "vocab_size", "n_heads", "mask_id") or value is None, (name, value)
                    loaded += 1
                except ValueError as error:
                    text = str(error)
                    assert len(text.splitlines()) == 1 and text.isprintable() and len(text) < 1000, (name, value, text)
    for text in ("9" * 10**5, "[" * 10**5, '{"a": ' * 10**5, "", "null", "\x00", json.dumps(config)[:-5]):
        (tmp_path / "config.json").write_text(text)
        line(lambda: load(tmp_path), "config.json")
    assert loaded < 100 and time.time() - began < 30


def foreign(folder, state, **more):
    config = {"model_type": "duo", "vocab_size": 11, "hidden_dim": 32, "cond_dim": 16, "n_blocks": 2, "n_heads": 2, "dropout": 0.1, "model_length": 6, "time_conditioning": True}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | more))
    return {f"backbone.{name}": tensor.contiguous() for name, tensor in state.items()}


@torch.no_grad()
def test_weights_of_others(tmp_path):
    """One file or shards, of safetensors or torch.save, with the prefixes that tools add or leave out: the same network."""
    state, given = known("dit")
    gpt2, where = gpt2_like(tmp_path), tmp_path / "hub"
    names = sorted(state)

    def right(**options):
        out = load(where, tokenizer=gpt2, **options).net(given["x"], given["sigma"])
        torch.testing.assert_close(out, given["out"], atol=1e-5, rtol=1e-5)
        shutil.rmtree(where)

    def split(tensors, stem, ending, write):
        parts = [f"{stem}-0000{i + 1}-of-00002.{ending}" for i in range(2)]
        places = {name: parts[i % 2] for i, name in enumerate(sorted(tensors))}
        for part in parts:
            write({name: tensors[name] for name in tensors if places[name] == part}, where / part)
        (where / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        return parts

    tensors = foreign(where, state)
    split(tensors, "model", "safetensors", save_file)
    right()
    foreign(where, state)
    split(tensors, "pytorch_model", "bin", torch.save)
    right()
    foreign(where, state)
    torch.save(tensors, where / "pytorch_model.bin")
    right()
    for change in (lambda name: name.removeprefix("backbone."), lambda name: name.replace("backbone.", "backbone._orig_mod."), lambda name: f"_orig_mod.{name}"):
        foreign(where, state)
        save_file({change(name): tensor for name, tensor in tensors.items()}, where / "model.safetensors")
        right()
    path = lightning(tmp_path / "compiled.ckpt", {f"_orig_mod.{name}": tensor for name, tensor in state.items()}, "duo", gpt2, averaged=False)
    torch.testing.assert_close(load(path).net(given["x"], given["sigma"]), given["out"], atol=1e-5, rtol=1e-5)

    foreign(where, state)
    first, second = split(tensors, "model", "safetensors", save_file)
    (where / second).rename(where / "away")
    line(lambda: load(where, tokenizer=gpt2), "model.safetensors.index.json", "of 2 parts", second)
    shutil.copy(where / first, where / second)
    line(lambda: load(where, tokenizer=gpt2), second, f"backbone.{names[1]}")
    (where / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"backbone.a": "../hub/away"}}))
    line(lambda: load(where, tokenizer=gpt2), "index.json", "in this directory")
    (where / "model.safetensors.index.json").unlink()
    line(lambda: load(where, tokenizer=gpt2), "has no weights", "pytorch_model.bin")

    shards = {"backbone.vocab_embed.embedding": torch.zeros(11, 8)}, {"backbone.output_layer.linear.bias": torch.zeros(11)}
    foreign(where, {}, hidden_dim=8, n_blocks=1, n_heads=1, cond_dim=8)
    for i, tensors in enumerate(shards):
        save_file(tensors, where / f"part-{i}")
    (where / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: f"part-{i}" for i, tensors in enumerate(shards) for name in tensors}}))
    line(lambda: load(where, tokenizer=gpt2), "lacks 'backbone.blocks.0.", "more")
    for name in ("model.safetensors", "config.json", "x.ckpt"):
        (where / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 678901234\n")
        line(lambda: load(where / name if name == "x.ckpt" else where, tokenizer=gpt2), name, "Git LFS", "git lfs pull")
