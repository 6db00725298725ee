"""The page in front of all experiments."""

from experiments.front_page import PAGE, text


def test_it_is_made_of_the_records():
    assert PAGE.read_text() == text()
