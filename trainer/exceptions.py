"""Errors of the trainer."""

from schemas.exceptions import StarcastError


class TrainerError(StarcastError):
    """No model can be fitted from what was given: too few rows, no ratings, an unfit encoder."""


class DivergedError(TrainerError):
    """A fit came to no number: its settings take too large steps."""
