"""Pages that have no tests of their own for it are made of their records too."""

from pathlib import Path

import pytest

import experiments
from experiments.faults import summary as faults
from experiments.memory import summary as memory
from experiments.memory.tables import CAP, DEPTH, OFFLOAD, PEAKS, VERSIONS
from experiments.order_and_group import page as order_and_group
from experiments.paper_memory import summary as paper_memory
from experiments.paper_memory.comparison import paper
from experiments.paper_memory.jobs import BEYOND, LLAMA7B, OTHERS
from experiments.parked_dtype import runs as parked_dtype

HERE = Path(experiments.__file__).parent

PAGES = {
    "faults": lambda: faults.summary(faults.TABLE.load()),
    "memory": lambda: memory.summary(*(table.load() for table in (VERSIONS, PEAKS, CAP, DEPTH, OFFLOAD))),
    "order_and_group": lambda: order_and_group.summary(order_and_group.load()),
    "paper_memory": lambda: paper_memory.summary(paper(), *(table.load() for table in (LLAMA7B, OTHERS, BEYOND))),
    "parked_dtype": lambda: parked_dtype.summary(parked_dtype.TABLE.load()),
}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_made_of_the_record(name):
    assert (HERE / name / "summary.md").read_text() == PAGES[name]()
