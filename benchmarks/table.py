"""Writes the table of times into the README, from a run that is under benchmarks/results.

python benchmarks/table.py [FILE]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from peft_kernels.bench.results import read, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu.jsonl"
README = ROOT / "README.md"


def written(text: str, shown: str) -> str:
    """The text with `shown` between its bench markers."""
    return re.sub(r"(<!-- bench -->\n).*?(<!-- /bench -->)", lambda m: m[1] + shown + m[2], text, flags=re.DOTALL)


if __name__ == "__main__":
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    README.write_text(written(README.read_text(), table(read(results))))
