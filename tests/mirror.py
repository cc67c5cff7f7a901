"""Small copies of everything that the parameter files take from the network, in the layouts of their repositories.

    python tests/mirror.py FOLDER     then run anything with DUO_DATA=FOLDER HF_HUB_CACHE=FOLDER/hub HF_HUB_OFFLINE=1

`write_mirror`: the data sets of `duo.data.DATASETS`, CIFAR-10, and the tasks of paper II, table 1; `write_hub`: a cache of the hub with tiny
models and tokenizers under the names of the real ones.
"""
import json
import random
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from duo.data import DATASETS, austen_books, tokenizer

SIZES = {"openwebtext": 100_050, "fineweb-edu": 100_050, "lm1b": 400, "lambada": 60}  # documents; others 200
HABITS = {"ptb": "it does n't cost $ N , the bank 's plan", "lm1b": '" I \'m here , " he said .', "wikitext": " = Plot = \n The 1 @,@ 200 km ( 746 mi ) .", "lambada": "“ Why ? ” he asked.",
          "wikitext+lm1b": "we find @xmath0 , e.g. in [ 1 ] ."}


def write_repository(folder, row, texts):
    """The repository of a row: `texts` is the hub's split → list of texts."""
    place, card = Path(folder, row.hub), Path(folder, row.hub, "README.md")
    named = row.config or "default"
    lines = [f"- config_name: {named}", "  data_files:"]
    for split, column in texts.items():
        file = row.files.format(split=split).replace("*.parquet", "0000.parquet").replace("*", "") if row.files else f"{named}/{split}-00000-of-00001.parquet"
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({row.column: column}), place / file)
        lines.append(f"  - split: {split}\n    path: {named}/{split}-*")
    if not row.files:
        old = card.read_text().removesuffix("---\n") if card.exists() else "---\nconfigs:\n"
        card.write_text(old + "\n".join(lines) + "\n---\n")


def write_mirror(folder, names=None):
    """Copies of the data sets `names` (default: all) with sentences of Persuasion; returns the folder."""
    sentences, random_ = austen_books()["persuasion"].replace("\n", " ").split(". "), random.Random(0)
    done = set()
    for name in names or DATASETS:
        row = DATASETS[name]
        if not row.hub or (row.hub, row.config, row.files) in done:
            continue
        done.add((row.hub, row.config, row.files))
        if row.hub.startswith("http"):
            place = Path(folder, row.hub.split("://")[1])
            place.parent.mkdir(parents=True, exist_ok=True)
            letters = "".join(c if "a" <= c <= "z" else " " for c in austen_books()["persuasion"].lower())
            with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("text8", " ".join(letters.split())[:100_000])
            continue
        n, many = SIZES.get(name.removesuffix("-packed"), 200), name in ("openwebtext", "fineweb-edu")
        documents = [f"Document {i}." if many and 50 <= i < n - 50 else random_.choice(sentences) + ". " + HABITS.get(row.detokenizer, "") for i in range(n)]
        texts = {split.split("[")[0]: documents for split in row.splits.values()}
        if "validation" in texts or "test" in texts:
            texts = {split: documents[i::len(texts)] for i, split in enumerate(texts)}
        write_repository(folder, row, texts)
    return Path(folder)


TASKS = {  # repository → (configurations, whether there is a test split, a row)
    "allenai/ai2_arc": (["ARC-Easy", "ARC-Challenge"], True, {"id": "1", "question": "Who was vain?", "choices": {"text": ["Anne", "Sir Walter", "Mary"], "label": ["A", "B", "C"]}, "answerKey": "B"}),
    "allenai/openbookqa": (["main"], True, {"id": "1", "question_stem": "Anne was", "choices": {"text": ["persuaded", "a ship", "a tree", "blue"], "label": ["A", "B", "C", "D"]}, "answerKey": "A"}),
    "allenai/winogrande": (["winogrande_xl"], False, {"sentence": "Mary called Anne because _ was ill.", "option1": "Mary", "option2": "Anne", "answer": "1"}),
    "baber/piqa": (["default"], False, {"goal": "To dry a wet coat,", "sol1": "hang it up.", "sol2": "wet it.", "label": 0}),
    "regisss/math_qa": (["default"], True, {"Problem": "what is 1 + 1 ?", "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5", "correct": "b"}),
    "Rowan/hellaswag": (["default"], False, {"ctx_a": "A man walks.", "ctx_b": "he", "activity_label": "Walking", "endings": ["walks on.", "is a sea.", "flies.", "rains."], "label": "0"}),
}


def write_tasks(folder, n=4):
    """The data of the seven tasks of paper II, table 1: n rows a split."""
    for name, (configs, test, row) in TASKS.items():
        place, lines = Path(folder, name), []
        for config in configs:
            lines += [f"- config_name: {config}", "  data_files:"]
            for split in ("train", "validation", *["test"] * test):
                file = place / config / f"{split}-00000-of-00001.parquet"
                file.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(pa.Table.from_pylist([row] * n), file)
                lines.append(f"  - split: {split}\n    path: {config}/{split}-*")
        (place / "README.md").write_text("---\nconfigs:\n" + "\n".join(lines) + "\n---\n")


def write_cifar10(folder, n=20):
    """n images of each part of CIFAR-10, of noise, as `duo.images` reads a copy of it."""
    rng = np.random.default_rng(0)
    Path(folder, "cifar10").mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        np.savez(Path(folder, "cifar10", f"{part}.npz"), x=rng.integers(256, size=(n, 32, 32, 3), dtype=np.uint8), y=np.arange(n) % 10, classes=[f"class {i}" for i in range(10)])


def _snapshot(hub, name):
    """The folder of a model in a cache of the hub."""
    place = Path(hub, "models--" + name.replace("/", "--"))
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs/main").write_text("0" * 40)
    (place / "snapshots" / ("0" * 40)).mkdir(parents=True, exist_ok=True)
    return place / "snapshots" / ("0" * 40)


def write_hub(hub):
    """A cache of the hub (HF_HUB_CACHE) with GPT-2's and BERT's tokenizers of about a thousand symbols, a tiny gpt2-large, and the authors' two published models; returns its folder."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import BertWordPieceTokenizer, Tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from duo.dit import DiT, DiTConfig
    torch.manual_seed(0)
    backend = Tokenizer.from_str(tokenizer("bpe1024").backend.to_str())
    backend.add_special_tokens(["<|endoftext|>"])
    gpt2 = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"-"
    symbols = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), "the", "and", "of", "to", "anne", "##ing", "##ed"]
    bert = BertWordPieceTokenizer({symbol: i for i, symbol in enumerate(symbols)}, lowercase=True)
    bert = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bert.to_str()), **{f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")})
    for name, kind, made in (("gpt2", "gpt2", gpt2), ("gpt2-large", "gpt2", gpt2), ("bert-base-uncased", "bert", bert)):
        made.save_pretrained(_snapshot(hub, name))
        (_snapshot(hub, name) / "config.json").write_text(json.dumps({"model_type": kind}))
    end = len(gpt2) - 1
    GPT2LMHeadModel(GPT2Config(vocab_size=len(gpt2), n_positions=1024, n_embd=16, n_layer=1, n_head=2, bos_token_id=end, eos_token_id=end)).save_pretrained(_snapshot(hub, "gpt2-large"))
    for name in ("s-sahoo/duo", "s-sahoo/duo-distilled"):
        net = DiT(DiTConfig(len(gpt2) + 1, 16, 1, 2, 16))  # one symbol more: the padding that the authors added
        save_file({f"backbone.{key}": value.contiguous() for key, value in net.state_dict().items()}, _snapshot(hub, name) / "model.safetensors")
        config = {"architectures": ["DUO"], "auto_map": {"AutoModelForMaskedLM": "model.DUO"}, "model_type": "duo", "vocab_size": len(gpt2) + 1, "hidden_dim": 16, "cond_dim": 16, "n_blocks": 1,
                  "n_heads": 2, "dropout": 0.1, "model_length": 64, "time_conditioning": True, "tokenizer_name_or_path": "gpt2"}  # the real ones' 50,258 rows say gpt2 themselves
        (_snapshot(hub, name) / "config.json").write_text(json.dumps(config))
    return Path(hub)


if __name__ == "__main__":
    write_mirror(sys.argv[1])
    write_tasks(sys.argv[1])
    write_cifar10(sys.argv[1])
    print(write_hub(Path(sys.argv[1], "hub")).parent)
