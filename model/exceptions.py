"""Errors of the model package."""

from schemas.exceptions import StarcastError


class BundleError(StarcastError):
    """A bundle is damaged, foreign, or of a version that this code cannot serve."""


class EncoderError(StarcastError):
    """A text encoder's directory cannot be loaded."""


class LayoutError(StarcastError):
    """Bytes at rest do not have this code's layout of states or features."""


class GapError(StarcastError):
    """Journal rows are missing between a state and the rows to apply."""


class EngineClosedError(StarcastError):
    """Work was handed to an engine that has stopped."""


class DeadlineError(StarcastError):
    """Work in an engine's queue was not begun before the deadline it must not outlive."""


class RegistryError(StarcastError):
    """The registry of bundles cannot be read, or another writer changed it meanwhile."""


class TrialError(StarcastError):
    """A version on trial cannot predict a batch."""


class DeviceError(StarcastError):
    """A device was asked for that this machine or this build of torch lacks."""
