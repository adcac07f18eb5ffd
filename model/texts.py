"""Texts as they are read: without HTML, control characters and runs of space."""

import html
import re
import unicodedata

_HIDING = re.compile(r"<(?:(script)|(style))\b|<!--", re.IGNORECASE)
_HIDDEN_TO = {  # by the group above
    1: re.compile(r"</script\s*>", re.IGNORECASE),
    2: re.compile(r"</style\s*>", re.IGNORECASE),
    None: re.compile("-->"),
}
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,500}>")
_BEYOND = re.compile(r"&#[0-9]{100,};?")  # no letter's number; of so many digits Python makes none
_MOST_MARKS = 30  # on a letter, as in the stream-safe format of Unicode (UAX 15)
_SIGNS = re.compile(rf"[^\w\s!-~]{{{_MOST_MARKS + 1},}}")  # marks are among them


def plain(text: str | None) -> str:
    """What a reader would see of a text; tags become a space, entities their characters.

    Live texts and those of training pass through here, so that both mean the same.
    """
    if not text:
        return ""
    if "<" in text:
        text = _TAG.sub(" ", shown(text))
    if "&" in text:
        text = unescaped(text)
    if not text.isprintable():  # line ends, control and format characters, no-break spaces
        text = "".join(letter if letter.isprintable() else _seen(letter) for letter in text)
    text = _SIGNS.sub(lambda found: _thinned(found[0]), text)
    return " ".join(unicodedata.normalize("NFC", text).replace("\ufffd", " ").split())


def _seen(letter: str) -> str:
    """A space, but nothing of what stands within words: soft hyphens, joiners, marks of direction.

    Words end at a space of no width.
    """
    within = unicodedata.category(letter) == "Cf" and letter != "\u200b"
    return "" if within else " "


def unescaped(text: str) -> str:
    """A text with HTML's entities as their characters; U+FFFD for a number that none has."""
    return html.unescape(_BEYOND.sub("\ufffd", text))


def _thinned(signs: str) -> str:
    """Signs with no more marks on one letter than Unicode asks for.

    Marks are put in order in the square of their number: a text of nothing else takes a minute.
    """
    kept: list[str] = []
    marks = 0
    for sign in signs:
        marks = marks + 1 if unicodedata.category(sign)[0] == "M" else 0
        if marks <= _MOST_MARKS:
            kept.append(sign)
    return "".join(kept)


def shown(text: str) -> str:
    """A text with a space for each script, style and comment that has an end.

    One pattern for both ends would look for the end anew from each of many beginnings: of a text of
    the longest kind that takes half a minute.
    """
    parts: list[str] = []
    reached = 0
    left = dict(_HIDDEN_TO)
    for begin in _HIDING.finditer(text):
        ending = left.get(begin.lastindex)
        if ending is None or begin.start() < reached:
            continue
        end = ending.search(text, begin.end())
        if end is None:  # nor has any later one of its kind
            del left[begin.lastindex]
        else:
            parts += [text[reached : begin.start()], " "]
            reached = end.end()
    return "".join([*parts, text[reached:]])
