"""Small copies of every data set of `duo.data.DATASETS`, in the layouts of their repositories: what $DUO_DATA reads in place of the hub.

    python tests/mirror.py FOLDER     then run anything with DUO_DATA=FOLDER
"""
import random
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from duo.data import DATASETS, austen_books

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


if __name__ == "__main__":
    print(write_mirror(sys.argv[1]))
