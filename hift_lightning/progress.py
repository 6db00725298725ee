"""A progress bar for what takes long before training."""

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import Progress


class PreparationBar(Progress):
    """A bar that goes when the work is done; on the terminal of rank 0, and nothing elsewhere.

    Args:
        what: is being done.
    """

    def __init__(self, what: str = "") -> None:
        console = Console(stderr=True)
        super().__init__(console=console, transient=True, disable=not (is_rank_0() and console.is_terminal))
        self._task = self.add_task(what, total=None)

    def says(self, what: str) -> None:
        """Tell what is being done."""
        self.update(self._task, description=what)

    def is_at(self, done: int, of: int) -> None:
        """Tell how much has been done of how much; the whole may turn out larger on the way."""
        self.update(self._task, completed=done, total=of)

    def moves_by(self, done: int) -> None:
        """Tell that so much more has been done."""
        self.update(self._task, advance=done)


def is_rank_0() -> bool:
    """Whether this process is the one that shows what all of them do."""
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]  # Lightning sets it when it is imported
    return rank == 0
