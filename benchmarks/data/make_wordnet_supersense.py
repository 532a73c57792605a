#!/usr/bin/env python3
"""Make wordnet_supersense.tsv.xz: the gloss of a noun -> its lexicographer class, from WordNet 3.0's data.noun.

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wn
    python benchmarks/data/make_wordnet_supersense.py wn/usr/share/wordnet/data.noun

With data.verb it makes wordnet_verbs.tsv.xz of the verbs. Debian's wordnet-base 1:3.0-37 gives the files in this folder
byte for byte; --check compares and writes nothing.
"""

import argparse
import hashlib
import lzma
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Part:
    """A part of speech. A class with too few synsets for its rows is left out."""

    name: str
    first: int  # number of the first lexicographer file
    classes: list[str]  # one per file, in order (man 5WN lexnames)
    out: str
    min_synsets: int
    test_per_class: int
    train_cap: int

    @property
    def path(self) -> Path:
        return Path(__file__).with_name(self.out)


# Tops only holds the roots of the hierarchy.
# fmt: off
NOUNS = [
    "Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food",
    "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity",
    "relation", "shape", "state", "substance", "time",
]
VERBS = [
    "body", "change", "cognition", "communication", "competition", "consumption", "contact", "creation", "emotion",
    "motion", "perception", "possession", "social", "stative", "weather",
]
# fmt: on
PARTS = {  # motive (42 synsets) and weather (66) are left out
    "data.noun": Part("noun", 3, NOUNS, "wordnet_supersense.tsv.xz", 300, 100, 200),
    "data.verb": Part("verb", 29, VERBS, "wordnet_verbs.tsv.xz", 200, 60, 100),
}
SEED = "supersense-1"
RUDE = re.compile(r"slur\)|(obscene|offensive|disparaging) (terms?|words?)")  # a demo has no use for them


def synsets(path: Path, part: Part):
    """(label, definition) of every synset, without the quoted examples."""
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith("  "):  # the licence at the top
            continue
        head, _, gloss = line.partition(" | ")
        definition = re.split(r'\s*(?:[;:,]|as in|e\.g\.)*\s*"', gloss, maxsplit=1)[0]
        if not RUDE.search(gloss):
            yield (
                f"{part.name}.{part.classes[int(head.split()[1]) - part.first]}",
                " ".join(definition.split()).strip(" ;:,"),
            )


def key(text: str) -> str:
    """Texts that differ only in case or punctuation count as one, so none of them is on both sides of the split."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def rows(path: Path, part: Part) -> list[tuple[str, str, str]]:
    size, labels, text_of = defaultdict(int), defaultdict(set), {}
    for label, text in synsets(path, part):
        size[label] += 1
        if len(key(text).split()) >= 2:
            labels[key(text)].add(label)
            text_of.setdefault(key(text), text)
    by_class = defaultdict(list)
    for k, seen in labels.items():
        if len(seen) == 1:  # one text with two classes has no right answer
            by_class[next(iter(seen))].append(k)
    out = []
    for label in sorted(name for name, n in size.items() if n >= part.min_synsets and name != "noun.Tops"):
        # Order by a hash, not by `random`: the same sample whatever the Python version.
        order = sorted(by_class[label], key=lambda k: hashlib.sha256(f"{SEED} {k}".encode()).digest())
        for i, k in enumerate(order[: part.test_per_class + part.train_cap]):
            out.append((text_of[k], label, "test" if i < part.test_per_class else "train"))
    # Another hash than above, whose small values belong to the large classes: any stretch of rows is a fair sample.
    out.sort(key=lambda r: (r[2], hashlib.sha256(f"{SEED} order {r[0]}".encode()).digest()))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="data.noun|data.verb")
    parser.add_argument("--check", action="store_true", help="compare with the file in this folder, write nothing")
    args = parser.parse_args()
    if args.source.name not in PARTS:
        parser.error(f"{args.source} is neither of {', '.join(PARTS)}")
    part = PARTS[args.source.name]
    made, out = rows(args.source, part), part.path
    tsv = "text\tlabel\tsplit\n" + "".join("\t".join(r) + "\n" for r in made)
    if args.check:
        # Compare texts, not archives: another liblzma may pack the same text into other bytes.
        same = lzma.decompress(out.read_bytes()).decode() == tsv
        print(f"{out.name}: {'same' if same else 'DIFFERENT'}")
        return 0 if same else 1
    out.write_bytes(lzma.compress(tsv.encode(), preset=9 | lzma.PRESET_EXTREME))
    count = {s: sum(r[2] == s for r in made) for s in ("train", "test")}
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    print(f"{out.name}: {count['train']} train, {count['test']} test, {out.stat().st_size} bytes, sha256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
