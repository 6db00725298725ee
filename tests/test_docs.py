"""The pages of the documentation do what they say."""

from pathlib import Path

import pytest

from tests.docs_blocks import blocks_of, run_page

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("page", ["extending.md", "works_with.md"])
def test_the_blocks_of_a_page_run_and_print_what_it_says(page, tmp_path):
    run_page(DOCS / page, tmp_path)


def test_a_new_order_tier_or_layout_takes_fewer_than_20_lines():
    examples = [block for block in blocks_of(DOCS / "extending.md") if "@register_" in block.text]
    assert len(examples) == 3
    assert all(block.text.count("\n") < 20 for block in examples)


def test_a_page_that_prints_something_else_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match="page.md, line 6: not printed"):
        run_page(page, tmp_path)
    page.write_text("# Title\n\n```python\nprint(1)\n\n\nraise ValueError\n```\n")
    with pytest.raises(AssertionError, match="line 7, in <module>\n    raise ValueError"):
        run_page(page, tmp_path)
