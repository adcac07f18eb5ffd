"""The command line as tests call it."""

from typer.testing import CliRunner, Result

from starcast.main import app


def run(*arguments: str) -> Result:
    """What a command printed and its exit code; what was not raised on purpose is raised here."""
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
