#!/usr/bin/env python3
"""Make wordnet_supersense.tsv.xz: the gloss of a noun -> its lexicographer class, from WordNet 3.0's data.noun.

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wn
    python benchmarks/data/make_wordnet_supersense.py wn/usr/share/wordnet/data.noun

Debian's wordnet-base 1:3.0-37 gives the file in this folder byte for byte; --check compares and writes nothing.
"""

import argparse
import hashlib
import lzma
import re
import sys
from collections import defaultdict
from pathlib import Path

# Lexicographer files 03-28, in order (man 5WN lexnames). Tops only holds the roots of the hierarchy.
# fmt: off
CLASSES = [
    "Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food",
    "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity",
    "relation", "shape", "state", "substance", "time",
]
# fmt: on
MIN_SYNSETS = 300  # leaves motive (42) out: too few for a test part
TEST_PER_CLASS = 100
TRAIN_CAP = 200
SEED = "supersense-1"
RUDE = re.compile(r"slur\)|(obscene|offensive|disparaging) (terms?|words?)")  # a demo has no use for them
OUT = Path(__file__).with_name("wordnet_supersense.tsv.xz")


def synsets(path: Path):
    """(label, definition) of every noun synset, without the quoted examples."""
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith("  "):  # the licence at the top
            continue
        head, _, gloss = line.partition(" | ")
        definition = re.split(r'\s*(?:[;:,]|as in|e\.g\.)*\s*"', gloss, maxsplit=1)[0]
        if not RUDE.search(gloss):
            yield f"noun.{CLASSES[int(head.split()[1]) - 3]}", " ".join(definition.split()).strip(" ;:,")


def key(text: str) -> str:
    """Texts that differ only in case or punctuation count as one, so none of them is on both sides of the split."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def rows(path: Path) -> list[tuple[str, str, str]]:
    size, labels, text_of = defaultdict(int), defaultdict(set), {}
    for label, text in synsets(path):
        size[label] += 1
        if len(key(text).split()) >= 2:
            labels[key(text)].add(label)
            text_of.setdefault(key(text), text)
    by_class = defaultdict(list)
    for k, seen in labels.items():
        if len(seen) == 1:  # one text with two classes has no right answer
            by_class[next(iter(seen))].append(k)
    out = []
    for label in sorted(name for name, n in size.items() if n >= MIN_SYNSETS and name != "noun.Tops"):
        # Order by a hash, not by `random`: the same sample whatever the Python version.
        order = sorted(by_class[label], key=lambda k: hashlib.sha256(f"{SEED} {k}".encode()).digest())
        for i, k in enumerate(order[: TEST_PER_CLASS + TRAIN_CAP]):
            out.append((text_of[k], label, "test" if i < TEST_PER_CLASS else "train"))
    # Another hash than above, whose small values belong to the large classes: any stretch of rows is a fair sample.
    out.sort(key=lambda r: (r[2], hashlib.sha256(f"{SEED} order {r[0]}".encode()).digest()))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_noun", type=Path)
    parser.add_argument("--check", action="store_true", help="compare with the file in this folder, write nothing")
    args = parser.parse_args()
    made = rows(args.data_noun)
    tsv = "text\tlabel\tsplit\n" + "".join("\t".join(r) + "\n" for r in made)
    if args.check:
        # Compare texts, not archives: another liblzma may pack the same text into other bytes.
        same = lzma.decompress(OUT.read_bytes()).decode() == tsv
        print(f"{OUT.name}: {'same' if same else 'DIFFERENT'}")
        return 0 if same else 1
    OUT.write_bytes(lzma.compress(tsv.encode(), preset=9 | lzma.PRESET_EXTREME))
    count = {s: sum(r[2] == s for r in made) for s in ("train", "test")}
    digest = hashlib.sha256(OUT.read_bytes()).hexdigest()
    print(f"{OUT.name}: {count['train']} train, {count['test']} test, {OUT.stat().st_size} bytes, sha256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
