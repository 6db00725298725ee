"""The sweep over orders and group sizes: what it runs, and what its page takes from the table."""

from hydra import compose, initialize_config_module

from experiments.order_and_group.__main__ import FIXED, SWEPT
from experiments.order_and_group.page import best, plot, summary
from hift_lightning.engine.rotation import ORDERS


def row(order, group, rate, validation, test):
    return {
        "strategy.order": order,
        "strategy.group_size": str(group),
        "learning_rate": rate,
        "val/accuracy": str(validation),
        "test/accuracy": str(test),
        "memory/peak_device_bytes": str(100 * 2**20 * group),
        "hift/blocks": str(8 // group),
        "steps": "250",
    }


ROWS = [
    row("random", 1, "1.0e-4", 0.80, 0.70),
    row("random", 1, "2.0e-4", 0.81, 0.71),
    row("top2down", 2, "1.0e-4", 0.82, 0.90),
    row("top2down", 2, "2.0e-4", 0.82, 0.95),
    row("top2down", 1, "1.0e-4", 0.79, 0.72),
]


def test_every_value_is_one_that_the_application_takes():
    first = [f"{key}={values.partition(',')[0]}" for key, values in SWEPT.items()]
    with initialize_config_module("hift_lightning.conf", version_base="1.3"):
        cfg = compose("train", [*first, *FIXED])
    assert cfg.strategy._target_.endswith("HiFTStrategy")
    assert set(SWEPT["strategy.order"].split(",")) == set(ORDERS)


def test_rates_are_chosen_on_the_validation_part_and_of_equal_ones_the_lower():
    chosen = {key: found["learning_rate"] for key, found in best(ROWS).items()}
    assert list(chosen.items()) == [
        (("top2down", "1"), "1.0e-4"),
        (("top2down", "2"), "1.0e-4"),
        (("random", "1"), "2.0e-4"),
    ]


def test_the_page_has_the_chosen_runs_and_the_means_of_each_order(tmp_path):
    text = summary(ROWS)
    assert "| top2down | 2 | 4 | 200 | 82.0 | 82.0 | 1.0e-4 | 90.0 |" in text
    assert "| top2down | 1 | 8 | 100 | 79.0 |  | 1.0e-4 | 72.0 |" in text
    assert "`top2down` 81.0 %; `random` 71.0 %" in text
    plot(ROWS, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
