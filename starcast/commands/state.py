"""Commands that prove and mend what is kept: `state rebuild | check`, `verify-replay`.

What they call imports torch, which takes seconds, so they import it only when they run.
"""

from typing import TYPE_CHECKING, Annotated

import typer

from starcast.commands.context import (
    AsJson,
    fail,
    notes,
    print_json,
    print_marked,
    progress_bar,
    settings_of,
)
from starcast.settings import Settings
from streams.admin import check_topics

if TYPE_CHECKING:
    from streams.rebuild import Shop
    from streams.store import Store
    from streams.verification import Verification

app = typer.Typer(help="States in the store: rebuild them, check them. Workers may run meanwhile.")

Partition = Annotated[
    int | None, typer.Option(min=0, help="Only this partition; all when left out.")
]


@app.command()
def rebuild(context: typer.Context, partition: Partition = None) -> None:
    """Delete what the store has of partitions and compute it again from archive and topics.

    A worker that owns a partition may do the rest; the command waits until it is through.
    """
    settings = settings_of(context)
    partitions = _chosen(settings, partition)
    check_topics(settings.kafka)
    from streams.rebuild import KINDS_OF_STATES
    from streams.rebuild import rebuild as compute

    shop = shop_of(settings)
    with progress_bar() as progress:
        task = progress.add_task("Rebuilding", total=len(partitions) * KINDS_OF_STATES)
        for each in partitions:
            for done in compute(shop, each):
                progress.update(task, advance=1)
                by = ", by the worker that has taken over" if done.taken_over else ""
                said = f"{done.what} of partition {each}: {done.seconds:.1f} s{by}"
                print_marked("fine", said)
    shop.store.close()


@app.command()
def check(
    context: typer.Context,
    partition: Partition = None,
    as_json: AsJson = False,
) -> None:
    """Compare states with a recount from archive and topics; ends with 1 when something differs."""
    settings = settings_of(context)
    partitions = _chosen(settings, partition)
    check_topics(settings.kafka)
    from streams.recount import CHECKS, check_states

    shop = shop_of(settings)
    with progress_bar() as progress:
        task = progress.add_task("Checking", total=len(partitions) * len(CHECKS))

        def tell(what: str, number: int) -> None:
            progress.update(task, advance=1, description=f"Checking {what} of partition {number}")

        report = check_states(shop, partitions, tell)
    shop.store.close()
    _print(report, as_json)
    if report.differences:
        raise fail("States differ from the recount; `starcast state rebuild` computes them again.")


def verify_replay(context: typer.Context, as_json: AsJson = False) -> None:
    """Compute again all that was archived and compare; ends with 1 when something differs.

    Stop the scorers before, and let the archiver come to its end.
    """
    settings = settings_of(context)
    from streams.verify import verify_replay as verify

    store = store_of(settings)
    with progress_bar() as progress:
        task = progress.add_task("Replaying", total=None)
        report = verify(
            settings.archive,
            settings.models,
            store,
            lambda rows: progress.update(task, advance=rows),
        )
    store.close()
    _print(report, as_json)
    if not report.clean:
        raise fail(
            "The replay differs from what was written. It does where workers go on meanwhile: stop "
            "the scorers, let the archiver come to its end, and run this again."
        )


def _print(report: "Verification", as_json: bool) -> None:
    """JSON; or for people a line for each kind, then notes and examples."""
    if as_json:
        print_json(report.figures())
        return
    for what in sorted({*report.compared, *report.differences}):
        wrong, count = report.differences[what], report.compared[what]
        said = f"{wrong:,} of {count:,} differ" if wrong else f"{count:,} agree"
        print_marked(
            "wrong" if wrong else "fine", f"{what}: {said if count or not wrong else wrong}"
        )
    for line in (*report.notes, *report.examples):
        notes.print(line, markup=False, soft_wrap=True)


def _chosen(settings: Settings, partition: int | None) -> list[int]:
    partitions = settings.kafka.partitions
    if partition is None:
        return list(range(partitions))
    if partition >= partitions:
        raise typer.BadParameter(f"there are {partitions} partitions, 0 to {partitions - 1}")
    return [partition]


def store_of(settings: Settings) -> "Store":
    """The store of the shop in settings, with this release's states."""
    from model.state import LAYOUT_HASH
    from streams.store import Store

    return Store(settings.redis, LAYOUT_HASH, settings.kafka.partitions)


def shop_of(settings: Settings) -> "Shop":
    """Where the states of the shop in settings lie, and what they come from."""
    from streams.rebuild import Shop

    return Shop(store_of(settings), settings.kafka, settings.archive, settings.states)
