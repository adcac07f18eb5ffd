"""Addresses as they may be printed."""

import re

HIDDEN = "******"


def hide_password(url: str) -> str:
    """A URL with its password hidden, before the host or in the query.

    All up to the last @ counts as password: one that was not encoded may hold / and @ itself.
    """
    hidden = re.sub(r"(://[^/@:]*:).*(?=@)", rf"\1{HIDDEN}", url)
    return re.sub(r"([?&][^=&]*(?:password|secret)[^=&]*=)[^&]*", rf"\1{HIDDEN}", hidden)
