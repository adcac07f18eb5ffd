"""Times as the command line takes them."""

from datetime import UTC, datetime

import typer


def parse_time(text: str) -> datetime:
    """An RFC 3339 time or a date; UTC where no offset is given."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no time; write 2026-11-24T10:15:00Z or 2026-11-24"
        ) from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
