"""A few calls under pytest-benchmark, for its comparisons and histograms: `make bench-quick`.

The rivals, the checks and the figures of the documents are those of `peft-kernels bench`.
"""

from contextlib import ExitStack

import pytest

from peft_kernels.bench.case import timed
from peft_kernels.bench.cases import cases

CASES = [case for case in cases("cpu") if case.selection == "quick" and case.work().flops < 5e9]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours(benchmark, case):
    with ExitStack() as stack:
        problem = case.build(case, "cpu", stack)
        benchmark.group = case.op
        benchmark(timed(problem.ours[0], problem.g, case.mode))
