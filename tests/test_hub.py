"""Files of the authors' formats, written here from small sets of weights with known outputs, through the whole path of `duo.hub.load`."""
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import save_file

from duo.data import PixelTokenizer
from duo.hub import Model, load, read_checkpoint, save
from duo.metrics import evaluate_bound

DATA = Path(__file__).parent / "data"


def known(name):
    """(state, everything else) of tests/data/format_NAME.npz: weights by the files' own names, inputs and the output that belongs to them."""
    content = {key: torch.from_numpy(value) for key, value in np.load(DATA / f"format_{name}.npz").items()}
    return {k.removeprefix("state/"): v for k, v in content.items() if k.startswith("state/")}, {
        k: v for k, v in content.items() if not k.startswith("state/")
    }


def gpt2_like(folder):
    """Nine letters and the end of text in GPT-2's two files: 10 symbols."""
    (folder / "gpt2").mkdir()
    (folder / "gpt2/encoder.json").write_text(json.dumps({c: i for i, c in enumerate("abcdefghi")} | {"<|endoftext|>": 9}))
    (folder / "gpt2/vocab.bpe").write_text("#version: 0.2\n")
    return folder / "gpt2"


def bert_like(folder):
    """Eleven symbols in BERT's file, a mask of its own among them."""
    (folder / "bert").mkdir()
    (folder / "bert/vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]))
    return folder / "bert"


def lightning(path, state, algorithm, tokenizer=None, averaged=True, config=True, **settings):
    """A .ckpt as Lightning writes the authors' runs; with an average, the plain weights are something else."""
    buffers = {"rotary_emb.inv_freq"}
    if config is True:
        config = {
            "algo": {"name": algorithm, "causal_attention": algorithm == "ar", "time_conditioning": True, "T": 0},
            "noise": {"type": "log-linear", "eps": 1e-3},
            "model": {"hidden_size": 32, "cond_dim": 16, "length": "${data.block}", "n_blocks": 2, "n_heads": 2, "dropout": 0.1},
            "data": {"tokenizer_name_or_path": None if tokenizer is None else str(tokenizer), "block": 6},
            "loader": {"devices": [0, 1]},
        }
        for key, value in settings.items():
            OmegaConf.update(config := OmegaConf.create(config), key, value)
    weights = {f"backbone.{k}": v + 0.1 if averaged and k not in buffers else v for k, v in state.items()}
    content = {
        "epoch": 0,
        "global_step": 1_000_000,
        "pytorch-lightning_version": "2.2.1",
        "state_dict": weights | {f"teacher.{k}": v for k, v in state.items()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val/nll'}": {"best_model_path": Path("x")}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}],
        "hparams_name": "config",
        "hyper_parameters": OmegaConf.create(config),
        "hparams_type": type(OmegaConf.create({})),
    }
    if averaged:
        content["ema"] = {"decay": 0.9999, "num_updates": 7, "shadow_params": [v for k, v in state.items() if k not in buffers]}
    torch.save(content, path)
    return path


def same(found, wanted, what):
    """Printed with pytest -s; equal to 1e-5 in float32."""
    print(f"{what}: largest difference {(found - wanted).abs().max():.1e} of values up to {wanted.abs().max():.1f}")
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def causal_by_hand(state, x):
    """The causal variant of a DiT, written out: no noise level, gates of one, position i sees what is before it."""
    def norm(h, name):
        return F.layer_norm(h, h.shape[-1:], state[name + ".weight"])

    def linear(h, name):
        return h @ state[name + ".weight"].T + state.get(name + ".bias", 0)

    h = state["vocab_embed.embedding"][x]
    n, width = h.shape[1:]
    angle = torch.outer(torch.arange(n).double(), 1e4 ** (-torch.arange(0, 16, 2).double() / 16)).float()
    for i in range(2):
        q, k, v = linear(norm(h, f"blocks.{i}.norm1"), f"blocks.{i}.attn_qkv").view(*x.shape, 3, 2, 16).unbind(2)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        q, k = (torch.view_as_real(torch.complex(*u.chunk(2, -1)) * turn).movedim(-1, -2).flatten(-2) for u in (q, k))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / 4
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
        h = h + linear(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2), f"blocks.{i}.attn_out")
        h = h + linear(F.gelu(linear(norm(h, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.0"), approximate="tanh"), f"blocks.{i}.mlp.2")
    return linear(norm(h, "output_layer.norm_final"), "output_layer.linear")


@pytest.mark.parametrize("algorithm, method", [("duo", "duo"), ("distillation", "duo"), ("duo_base", "udlm"), ("mdlm", "mdlm"), ("sedd", "sedd_absorb")])
@torch.no_grad()
def test_lightning_dit(tmp_path, algorithm, method):
    state, given = known("dit")
    tokenizer = gpt2_like(tmp_path)
    path = lightning(tmp_path / "last.ckpt", state, algorithm, tokenizer)
    model = load(path)
    assert (model.method, model.length, model.training["steps"]) == (method, 6, 1_000_000)
    same(model.net(given["x"], given["sigma"]), given["out"], f"{algorithm}, hard")
    same(model.net(F.one_hot(given["x"], 11).float(), given["sigma"]), given["out"], f"{algorithm}, soft")
    same(model.net((given["x"][..., None], torch.ones(3, 6, 1)), given["sigma"]), given["out"], f"{algorithm}, top k")
    assert not torch.allclose(load(path, raw=True).net(given["x"], given["sigma"]), given["out"], atol=0.1)
    same(load(save(model, tmp_path / "ours")).net(given["x"], given["sigma"]), given["out"], f"{algorithm}, saved and loaded")
    same(Model.from_pretrained(tmp_path / "ours").net(given["x"], given["sigma"]), given["out"], f"{algorithm}, from_pretrained")


@torch.no_grad()
def test_a_mixture_of_tokens_is_a_token_whose_embedding_is_the_mixture(tmp_path):
    state, given = known("dit")
    tokenizer, weight = gpt2_like(tmp_path), torch.rand(11, generator=torch.Generator().manual_seed(0))
    mixed = state | {
        "vocab_embed.embedding": state["vocab_embed.embedding"].index_copy(0, torch.tensor([0]), (weight @ state["vocab_embed.embedding"])[None])
    }
    model, other = load(lightning(tmp_path / "a.ckpt", state, "duo", tokenizer)), load(lightning(tmp_path / "b.ckpt", mixed, "duo", tokenizer))
    want = other.net(torch.zeros(3, 6, dtype=torch.long), given["sigma"])
    same(model.net(weight.expand(3, 6, 11), given["sigma"]), want, "mixture of all tokens")
    index = torch.arange(11).expand(3, 6, 11)
    same(model.net((index, weight.expand(3, 6, 11)), given["sigma"]), want, "the same as indices and weights")


@pytest.mark.parametrize("make, start, never", [(gpt2_like, 9, 10), (bert_like, 2, 4)])
@torch.no_grad()
def test_lightning_causal(tmp_path, make, start, never):
    state, given = known("dit")
    state = {k: v for k, v in state.items() if "adaLN" not in k and "sigma_map" not in k}
    path = lightning(tmp_path / "ar.ckpt", state, "ar", make(tmp_path))
    model = load(path)
    same(model.net(given["x"]), causal_by_hand(state, given["x"]), "ar")
    assert model.ends == (never, start)
    x = given["x"].clamp(max=8) if never == 10 else torch.where(given["x"] == 4, 5, given["x"])
    bare, framed = torch.where(x == start, 6, x), x.index_fill(1, torch.tensor(0), start)
    logits = causal_by_hand(state, torch.cat([torch.full((3, 1), start), bare[:, :-1]], 1)).index_fill(-1, torch.tensor(never), -math.inf)
    same(model.loss(bare, None), F.cross_entropy(logits.mT, bare, reduction="none"), "likelihood of ar, text without its first symbol")
    logits = causal_by_hand(state, framed[:, :-1]).index_fill(-1, torch.tensor(never), -math.inf)
    by_hand = F.cross_entropy(logits.mT, framed[:, 1:], reduction="none")
    same(model.loss(framed, None), F.pad(by_hand, (1, 0)), "likelihood of ar in its frame: x[:-1] is read and x[1:] is scored")
    bound = evaluate_bound(model.loss, framed, exact=True)
    assert abs(bound.perplexity().mean - by_hand.double().mean().exp()) < 1e-4 and bound.scores.tokens.tolist() == [5, 5, 5]
    assert torch.equal(model.nll(framed).nats, bound.scores.nats) and model.nll(bare[:, :4]).tokens.tolist() == [5, 5, 5]
    assert (model.sample_tokens(64, seed=0)[:, 0] == start).all()
    assert not (model.sample_tokens(64, seed=0) == never).any()
    assert model.frame == (start, 9 if never == 10 else 3) and load(path, frame=(6, 7)).ends == (never, 6) and load(path, frame=None).ends == (never, start)
    assert load(path, frame=None).nll(bare[:, :4]).tokens.tolist() == [4, 4, 4] and load(path, layout="padded").layout == "padded"
    with pytest.raises(ValueError, match="frame: given"):
        load(path, frame=(6, 99))
    again = load(save(model, tmp_path / "ours"))
    assert again.ends == model.ends and torch.equal(again.sample_tokens(4, seed=0), model.sample_tokens(4, seed=0))


def same_logistic(found, wanted, what):
    """As `same`, but a level's probability is a difference of two float32 sigmoids: far in the tail, the machine decides its last digits."""
    near = wanted > -8
    same(found[near], wanted[near], what)
    torch.testing.assert_close(found[~near].exp(), wanted[~near].exp(), atol=2e-7, rtol=0)


@torch.no_grad()
def test_lightning_unet(tmp_path):
    class Ten(PixelTokenizer):
        vocab_size = 10

    state, given = known("unet")
    config = {
        "algo": {"name": "duo", "time_conditioning": True},
        "noise": {"type": "cosine"},
        "model": {"length": 48, "dropout": 0.1, "ch": 8},
        "data": {"num_classes": 3},
    }
    path = lightning(tmp_path / "unet.ckpt", state, "duo", config=config)
    model = load(path, tokenizer=Ten(3, 4, 4))
    same_logistic(model.net(given["x"], given["sigma"], given["labels"]), given["out"], "U-Net, hard")
    same_logistic(model.net(F.one_hot(given["x"], 10).float(), given["sigma"], given["labels"]), given["out"], "U-Net, soft")
    assert model.sample_tokens(2, steps=2, seed=0).shape == (2, 48) and model.loss(given["x"], torch.tensor([0.2, 0.9])).shape == (2, 48)
    told = []
    hook = model.net.register_forward_pre_hook(lambda _, args: told.append(args[1].max().item()))
    model.sample_tokens(1, steps=2, seed=0)
    hook.remove()
    half = math.sin(math.pi / 4 * (0.5 + 0.5e-3))  # 1 - cos(2x) = 2 sin(x)^2, at half of the time
    assert told == pytest.approx([13.605493, -math.log(2 * half**2)], rel=1e-6), "the published σ: ε is on the time"
    with pytest.raises(ValueError, match="length must be 3 channels of a square image, got 50"):
        load(path, tokenizer=Ten(3, 4, 4), length=50)
    with pytest.raises(ValueError, match="num_classes is 5 in its configuration and 3 in its tensors"):
        load(path, tokenizer=Ten(3, 4, 4), num_classes=5)


@torch.no_grad()
def test_unet_of_ours_round_trip(tmp_path):
    from duo.schedules import Cosine
    from duo.unet import UNet, UNetConfig
    net = UNet(UNetConfig(257, 1, 4, 4, 8, (1, 2), 1, 1, 0.0, 3))
    for p in net.parameters():
        p.normal_(std=0.1)
    model = Model(net, "mdlm", Cosine(), PixelTokenizer(1, 4, 4), 16)
    back = load(save(model, tmp_path, metrics={}))
    x, sigma = model.sample_tokens(2, steps=3, seed=0), torch.tensor([0.1, 1.0])
    assert (
        torch.equal(back.net(x, sigma), model.net(x, sigma))
        and torch.equal(back.sample_tokens(2, steps=3, seed=0), x)
        and back.decode(x)[0].shape == (4, 4, 1)
    )
    assert json.loads((tmp_path / "config.json").read_text())["network"] == "unet" and "U-Net of 8 channels" in (tmp_path / "README.md").read_text()
    assert math.isfinite(model.nll(x).nats.sum())


@torch.no_grad()
def test_published_repository(tmp_path):
    state, given = known("dit")
    tokenizer = gpt2_like(tmp_path)
    (tmp_path / "hub").mkdir()
    save_file({f"backbone.{k}": v for k, v in state.items()}, tmp_path / "hub/model.safetensors")
    config = {
        "architectures": ["DUO"],
        "auto_map": {"AutoModelForMaskedLM": "modeling_duo.DUO"},
        "model_type": "duo",
        "vocab_size": 11,
        "hidden_dim": 32,
        "cond_dim": 16,
        "n_blocks": 2,
        "n_heads": 2,
        "dropout": 0.1,
        "model_length": 6,
        "time_conditioning": True,
    }
    (tmp_path / "hub/config.json").write_text(json.dumps(config))
    (tmp_path / "hub/modeling_duo.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    model = load(tmp_path / "hub", tokenizer=tokenizer)
    same(model.net(given["x"], given["sigma"]), given["out"], "published")
    assert not (tmp_path / "ran").exists() and model.tokenizer.vocab_size == 11


def test_vocabularies(tmp_path):
    state, _ = known("dit")
    gpt2, bert = gpt2_like(tmp_path), bert_like(tmp_path)
    for algorithm, tokenizer, mask, V in (("duo", gpt2, None, 11), ("duo", bert, None, 11), ("mdlm", gpt2, 10, 10), ("mdlm", bert, 4, 11)):
        model = load(lightning(tmp_path / "x.ckpt", state, algorithm, tokenizer))
        assert (model.process.mask_id, model.process.vocab_size, model.tokenizer.vocab_size) == (mask, 11, V)
        assert mask is None or not (model.sample_tokens(8, steps=4, seed=0) == mask).any()
        back = load(save(model, tmp_path / "ours"))
        assert back.process == model.process and back.tokenizer.vocab_size == V and back.encode("abc").tolist() == model.encode("abc").tolist()
    wide = state | {
        k: torch.cat([state[k], state[k][:2]]) for k in ("vocab_embed.embedding", "output_layer.linear.weight", "output_layer.linear.bias")
    }
    with pytest.raises(ValueError, match=r"x.ckpt: duo with tokenizer 'gpt2' \(10 symbols\) needs a network of vocab_size 10, got 13"):
        load(lightning(tmp_path / "x.ckpt", wide, "duo", gpt2))
    with pytest.raises(ValueError, match="the file does not say its tokenizer, and 11 symbols do not tell"):
        load(lightning(tmp_path / "x.ckpt", state, "duo"))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("blocks.0.mlp.0.bias"), r"its tensors: lacks 'backbone\.blocks\.0\.mlp\.0\.bias'$"),
        (lambda s: s.update({"blocks.0.mlp.3.bias": torch.ones(1)}), r"its tensors: has unexpected 'backbone\.blocks\.0\.mlp\.3\.bias'$"),
        (
            lambda s: s.update({"blocks.1.norm1.weight": torch.ones(5)}),
            r"its tensors: 'backbone\.blocks\.1\.norm1\.weight' is \(5,\) where the others ask for \(32,\)$",
        ),
        (lambda s: s.pop("vocab_embed.embedding"), "neither a DiT"),
        (lambda s: s.update({"rotary_emb.inv_freq": torch.ones(8)}), "rotary_emb.inv_freq has not the base"),
        (lambda s: s.update({"rotary_emb.inv_freq": 1e4 ** (-torch.arange(0, 1, 1 / 4))}), "n_heads is 2 in its configuration and 4 in its tensors"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    state, _ = known("dit")
    change(state)
    with pytest.raises(ValueError, match=message) as caught:
        load(lightning(tmp_path / "x.ckpt", state, "duo", gpt2_like(tmp_path), averaged=False))
    assert "\n" not in str(caught.value)


def test_wrong_settings_are_named(tmp_path):
    state, _ = known("dit")
    tokenizer = gpt2_like(tmp_path)
    for settings, message in (
        ({"algo.name": "flow"}, "its algorithm is 'flow'; allowed: duo"),
        ({"noise.type": "square"}, "its noise is 'square'"),
        ({"model.hidden_size": 48}, "hidden_size is 48 in its configuration and 32 in its tensors"),
        ({"algo.time_conditioning": None}, "the file does not say time_conditioning"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            load(lightning(tmp_path / "x.ckpt", state, "duo", tokenizer, **settings))
    assert (
        load(
            lightning(tmp_path / "x.ckpt", state, "duo", tokenizer, **{"algo.time_conditioning": None}), time_conditioning=False
        ).net.config.time_conditioning
        is False
    )


def test_nothing_in_a_file_runs(tmp_path):
    """In a fresh interpreter with an audit hook: reading imports nothing that the file names, starts nothing, opens nothing to write."""
    state, _ = known("dit")
    path = lightning(tmp_path / "x.ckpt", state, "duo", gpt2_like(tmp_path))
    code = f"""
import sys, duo.hub
seen = []
sys.addaudithook(lambda event, args: seen.append((event, args)) if event in ("exec", "import", "os.system", "subprocess.Popen") else None)
duo.hub.read_checkpoint({str(path)!r})
print(sorted({{a[0].split(".")[0] for e, a in seen if e == "import"}} & {{"omegaconf", "lightning", "antlr4"}}), [e for e, _ in seen if e not in ("import", "exec")])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[] []\n"


def test_hostile_files_are_refused(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "evil.ckpt"

    class Evil:
        def __init__(self, *call):
            self.call = call

        def __reduce__(self):
            return self.call[0], self.call[1:]

    import os
    import runpy
    import shutil
    for call in (
        (os.system, f"touch {marker}"),
        (exec, f"open({str(marker)!r}, 'w')"),
        (subprocess.check_call, ["touch", str(marker)]),
        (runpy.run_path, "x.py"),
        (shutil.rmtree, str(tmp_path)),
    ):
        torch.save({"state_dict": {"backbone.w": torch.ones(1)}, "hyper_parameters": Evil(*call)}, path)
        with pytest.raises(ValueError, match="refused, nothing of it was run") as caught:
            read_checkpoint(path)
        assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match="refused"):
            load(path)
    assert not marker.exists() and tmp_path.exists()
