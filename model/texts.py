"""Texts as they are read: without HTML, control characters and runs of space."""

import html
import re
import unicodedata

_HIDDEN = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,500}>")


def plain(text: str | None) -> str:
    """What a reader would see of a text; tags become a space, entities their characters.

    Live texts and those of training pass through here, so that both mean the same.
    """
    if not text:
        return ""
    if "<" in text:
        text = _TAG.sub(" ", _HIDDEN.sub(" ", text))
    if "&" in text:
        text = html.unescape(text)
    if not text.isprintable():  # line ends, control and format characters, no-break spaces
        text = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(unicodedata.normalize("NFC", text).replace("\ufffd", " ").split())
