"""How far work is: what long work calls as it goes on, and a bar that shows it."""

from collections.abc import Callable

from rich.progress import Progress

OnProgress = Callable[[int, int], None]
"""Called with work done and work in all."""


def tracker(progress: Progress | None, words: str) -> OnProgress:
    """A bar of its own in `progress`, moved by calling it; without `progress` nothing is shown."""
    if progress is None:
        return unseen
    task = progress.add_task(words, total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)


def unseen(done: int, total: int) -> None:
    """Progress that nobody looks at."""
