"""The page and the picture of the sweep; every number comes from its table."""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from experiments.table import Row, markdown

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
MIB = 2**20
ORDER, GROUP, RATE = "strategy.order", "strategy.group_size", "learning_rate"
COLORS = {"top2down": "tab:blue", "bottom2up": "tab:red", "random": "tab:green"}


def load() -> list[Row]:
    """The table that the sweep left, a row for each run."""
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def best(rows: list[Row]) -> dict[tuple[str, str], Row]:
    """Of each order and group size the run with the highest validation accuracy, of equal ones the lower rate's."""
    chosen: dict[tuple[str, str], Row] = {}
    for row in sorted(rows, key=lambda row: (-float(row["val/accuracy"]), float(row[RATE]))):
        chosen.setdefault((row[ORDER], row[GROUP]), row)
    return dict(sorted(chosen.items(), key=lambda pair: (list(COLORS).index(pair[0][0]), int(pair[0][1]))))


def summary(rows: list[Row]) -> str:
    """The text."""
    chosen = best(rows)
    rates = sorted({row[RATE] for row in rows}, key=float)
    by_run = {(row[ORDER], row[GROUP], row[RATE]): row for row in rows}
    table = [
        [
            order,
            group,
            row["hift/blocks"],
            f"{_peak(row):.0f}",
            *(_percent(by_run.get((order, group, rate)), "val/accuracy") for rate in rates),
            row[RATE],
            _percent(row, "test/accuracy"),
        ]
        for (order, group), row in chosen.items()
    ]
    by_order = {order: [row for (name, _), row in chosen.items() if name == order] for order in COLORS}
    means = {
        order: 100 * sum(float(row["test/accuracy"]) for row in some) / len(some)
        for order, some in by_order.items()
        if some
    }
    steps = ", ".join(sorted({row["steps"] for row in rows}))
    validations = (f"val, rate {rate}" for rate in rates)
    head = ["order", "layers a block", "blocks", "peak MiB", *validations, "best rate", "test with it"]
    parts = [
        f"MiniLM on film reviews, AdamW, {steps} optimizer steps, one seed ({len(rows)} runs of one multirun). Peak "
        "bytes are weights, gradients and optimizer state together, at most.",
        markdown(head, table),
        "![Test accuracy against peak memory](order_and_group.png)",
        "Mean test accuracy over the group sizes, each run with the best rate of its row: "
        + "; ".join(f"`{order}` {value:.1f} %" for order, value in means.items())
        + "."
        + _alike(chosen),
    ]
    return "\n\n".join(parts) + "\n"


def _peak(row: Row) -> float:
    return float(row["memory/peak_device_bytes"]) / MIB


def _alike(chosen: dict[tuple[str, str], Row]) -> str:
    """A sentence for each group size with which a drawn order is that of `top2down`."""
    measured = ("val/accuracy", "test/accuracy", "val/loss", "test/loss")
    groups = [
        group
        for order, group in chosen
        if order == "random"
        and (given := chosen.get(("top2down", group)))
        and all(chosen[order, group].get(key) == given.get(key) for key in measured)
    ]
    return "".join(f" With {group} layers a block `random` drew the order of `top2down`." for group in groups)


def _percent(row: Row | None, column: str) -> str:
    return "" if row is None else f"{100 * float(row[column]):.1f}"


def plot(rows: list[Row], path: Path) -> None:
    """Test accuracy with the best rate against peak memory, a line for each order."""
    chosen = best(rows)
    figure, axis = pyplot.subplots(figsize=(7, 5))
    for order, color in COLORS.items():
        line = [row for (name, _), row in chosen.items() if name == order]
        accuracies = [100 * float(row["test/accuracy"]) for row in line]
        axis.plot([_peak(row) for row in line], accuracies, marker="o", color=color, label=order)
    ticks = {_peak(row): f"{_peak(row):.0f}\n{group} a block" for (_, group), row in chosen.items()}
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set_xlabel("peak of weights, gradients and optimizer state, MiB, and layers a block")
    axis.set_ylabel("test accuracy, %")
    axis.set_title("Orders of the blocks", fontsize=11)
    axis.margins(0.1)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
