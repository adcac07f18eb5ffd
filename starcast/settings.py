"""All settings, as one tree: `kafka.partitions`, `trainer.fit.epochs`, …

A value comes from the environment (`STARCAST_KAFKA__PARTITIONS`), else from `.env` in the working
folder, else from a TOML file (`starcast.toml` there, or the file that STARCAST_CONFIG names), else
it is the default. An empty STARCAST_CONFIG names no file. `load` knows of each value where it came
from, so that a wrong one can be found.
"""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_origin

import pydantic
import pydantic_settings
from pydantic import BaseModel, Field, SecretStr
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from schemas.exceptions import StarcastError
from schemas.urls import HIDDEN, hide_password
from starcast.log import LogConfig
from streams import config as streams_config
from streams.clients import option_name
from trainer.config import TrainerConfig

PREFIX = "STARCAST_"
CONFIG_VARIABLE = "STARCAST_CONFIG"
CONFIG_FILE = "starcast.toml"
OPTIONS = ("kafka", "options")
OF_KUBERNETES = ("tcp://", "udp://", "sctp://")  # values of STARCAST_WEB_PORT, of a service

_SECRET_OPTION = re.compile(r"password|secret|private|\.pem$|jaas|oauthbearer\.config")

Path_ = tuple[str, ...]  # of a setting in the tree


class SettingsError(StarcastError):
    """A setting that does not exist, or a value that it does not take."""


class Settings(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="ignore", validate_default=False
    )

    kafka: streams_config.KafkaConfig = Field(default_factory=streams_config.KafkaConfig)
    redis: streams_config.RedisConfig = Field(default_factory=streams_config.RedisConfig)
    archive: streams_config.ArchiveConfig = Field(default_factory=streams_config.ArchiveConfig)
    models: streams_config.ModelsConfig = Field(default_factory=streams_config.ModelsConfig)
    states: streams_config.StatesConfig = Field(default_factory=streams_config.StatesConfig)
    scorer: streams_config.ScorerConfig = Field(default_factory=streams_config.ScorerConfig)
    texts: streams_config.TextsConfig = Field(default_factory=streams_config.TextsConfig)
    insights: streams_config.InsightsConfig = Field(default_factory=streams_config.InsightsConfig)
    web: streams_config.WebConfig = Field(default_factory=streams_config.WebConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    log: LogConfig = Field(default_factory=LogConfig)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what the caller gives: `load` reads the sources itself, to remember each."""
        return (init_settings,)

    def __repr__(self) -> str:
        return "\n".join(f"{row.name} = {row.shown}" for row in describe(self))

    __str__ = __repr__


@dataclass(frozen=True)
class Setting:
    """One line of `starcast config`; `value` is hidden where it is a secret."""

    name: str
    shown: str
    source: str
    description: str


@dataclass(frozen=True)
class _Given:
    """A value as its source gives it, and how a person finds it there."""

    value: Any
    source: str


def load(config: Path | None = None, folder: Path | None = None) -> Settings:
    """The settings in force in `folder` (the working folder); `config` is a TOML file to read.

    Raises SettingsError, naming every wrong value, where it came from and what is accepted.
    """
    return _build(_given(config, folder or Path()))


def load_with_sources(
    config: Path | None = None, folder: Path | None = None
) -> tuple[Settings, list[Setting]]:
    """The settings in force, and one line for each with the source of its value."""
    given = _given(config, folder or Path())
    settings = _build(given)
    return settings, describe(settings, {path: entry.source for path, entry in given.items()})


def describe(settings: Settings, sources: Mapping[Path_, str] | None = None) -> list[Setting]:
    """One line for each setting, secrets hidden; `sources` says where values came from."""
    sources = sources or {}
    return [
        Setting(".".join(path), _show(path, value), sources.get(path, "default"), description)
        for path, value, description in _leaves(settings)
    ]


def variables(settings: Settings) -> dict[str, str]:
    """The environment in which a process has these settings, whatever else is set around it.

    It reads no settings file: what is not set here would be taken from one.
    """
    return {CONFIG_VARIABLE: ""} | {
        _variable(path): _text(_plain(value))
        for path, value, _ in _leaves(settings)
        if value is not None and value != {}
    }


def _build(given: Mapping[Path_, _Given]) -> Settings:
    tree: dict[str, Any] = {}
    for path, entry in given.items():
        branch = tree
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
        branch[path[-1]] = entry.value
    try:
        return Settings(**tree)
    except pydantic.ValidationError as problem:
        raise SettingsError(
            "\n".join(_explain(error, given) for error in problem.errors(include_url=False))
        ) from None


def _explain(error: ErrorDetails, given: Mapping[Path_, _Given]) -> str:
    """One wrong value: name, value, source, what is accepted."""
    location = tuple(str(part) for part in error["loc"])
    path = max((path for path in given if path == location[: len(path)]), key=len, default=location)
    entry = given.get(path)
    source = entry.source if entry else "default"
    field = _field_at(path)
    accepted = error["msg"].replace("Input should", "it should")
    about = f" It is: {field.description}." if field and field.description else ""
    return (
        f"Setting {'.'.join(path)} has the value {_show(path, entry and entry.value)} "
        f"({source}): {accepted}.{about}"
    )


# Sources ------------------------------------------------------------------------------------------


def _given(config: Path | None, folder: Path) -> dict[Path_, _Given]:
    """Every value that is given somewhere, by the source that wins."""
    given: dict[Path_, _Given] = {}
    given |= _from_toml(config, folder)
    dotenv = folder / ".env"
    try:
        variables = DotEnvSettingsSource(Settings, env_file=dotenv)
    except UnicodeDecodeError as problem:
        raise SettingsError(f"{dotenv} is not in UTF-8: {problem}. Save it as UTF-8.") from None
    given |= _from_variables(variables, f"{dotenv}: ")
    given |= _from_variables(EnvSettingsSource(Settings), "environment variable ")
    return given


def _from_variables(source: EnvSettingsSource, place: str) -> dict[Path_, _Given]:
    def locate(path: Path_) -> str:
        return place + _variable(path)

    # Others that begin so may be anybody's: Kubernetes makes some for a service of this name.
    known = [_variable(path) for path, _, _ in _leaves(Settings())]
    meant_by = {name.replace("__", "_"): name for name in known}
    for variable, value in source.env_vars.items():
        group, nested, _ = variable.upper().removeprefix(PREFIX).partition("__")
        if not variable.upper().startswith(PREFIX):
            continue
        if variable.upper() == CONFIG_VARIABLE and isinstance(source, DotEnvSettingsSource):
            raise SettingsError(f"{place}{CONFIG_VARIABLE} is read of the environment alone.")
        ours = not (value or "").startswith(OF_KUBERNETES)
        if not nested and ours and (meant := meant_by.get(variable.upper())):
            raise SettingsError(
                f"There is no setting {place}{variable.upper()}. Did you mean {meant}? Names are "
                "parted by two underscores."
            )
        if nested and group.lower() not in Settings.model_fields:
            raise SettingsError(
                _unknown((group.lower(),), locate((variable[len(PREFIX) :],)), Settings)
            )
        if (value or "").startswith(("[", "{")) and not _is_json(value or ""):
            raise SettingsError(
                f"{locate((variable[len(PREFIX) :],))} begins like JSON but is not."
            )
    try:
        tree = {name: value for name, value in source().items() if name in Settings.model_fields}
    except pydantic_settings.SettingsError:
        raise SettingsError(
            f"{locate((_not_json(source)[len(PREFIX) :],))} takes a list or a group of settings, "
            'and these are written as JSON, such as ["one", "two"].'
        ) from None
    return {path: _Given(value, locate(path)) for path, value in _flatten(tree, locate)}


def _not_json(source: EnvSettingsSource) -> str:
    """The variable at which a source failed, which itself names the group alone."""
    for variable, value in source.env_vars.items():
        source.env_vars = {variable: value}
        try:
            source()
        except pydantic_settings.SettingsError:
            return variable
    raise AssertionError("no variable is wrong by itself")


def _variable(path: Path_) -> str:
    """The environment variable of a setting."""
    return f"{PREFIX}{'__'.join(path).replace('.', '_').upper()}"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def file_in_force(config: Path | None = None, folder: Path | None = None) -> Path | None:
    """The TOML file that `load` reads; none where there is none. Raises SettingsError."""
    told = os.environ.get(CONFIG_VARIABLE)
    if config is None and told == "":
        return None
    named = config or (Path(told) if told else None)
    file = named or (folder or Path()) / CONFIG_FILE
    if file.is_file():
        return file
    if named is None:
        return None
    raise SettingsError(
        f"There is no settings file {file}. Name another by --config or {CONFIG_VARIABLE}."
    )


def _from_toml(config: Path | None, folder: Path) -> dict[Path_, _Given]:
    file = file_in_force(config, folder)
    if file is None:
        return {}
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise SettingsError(f"{file} is not a TOML file: {problem}.") from None
    except OSError as problem:
        raise SettingsError(f"{file} cannot be read: {problem.strerror}.") from None

    def locate(path: Path_) -> str:
        return str(file)

    return {path: _Given(value, locate(path)) for path, value in _flatten(tree, locate)}


def _flatten(
    tree: Mapping[str, Any],
    locate: Callable[[Path_], str],
    path: Path_ = (),
    model: type[BaseModel] = Settings,
) -> Iterator[tuple[Path_, Any]]:
    """The values of a source by their path in the tree of settings."""
    for name, value in tree.items():
        here = (*path, name)
        field = model.model_fields.get(name)
        if field is None:
            raise SettingsError(_unknown(here, locate(here), model))
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            if not isinstance(value, Mapping):
                raise SettingsError(
                    f"Setting {'.'.join(here)} ({locate(here)}) is a group of settings, not a "
                    f"value. It has: {', '.join(field.annotation.model_fields)}."
                )
            branch = cast(Mapping[str, Any], value)
            yield from _flatten(branch, locate, here, field.annotation)
        elif here == OPTIONS and isinstance(value, Mapping):
            yield from _flatten_options(cast(Mapping[str, Any], value))
        elif isinstance(value, Mapping) and get_origin(field.annotation) is dict:
            for key, entry in cast(Mapping[str, Any], value).items():
                yield (*here, key), entry
        else:
            yield here, value


def _flatten_options(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[Path_, Any]]:
    """librdkafka options under their own names; TOML without quotes makes tables of the dots."""
    for key, value in options.items():
        name = f"{prefix}{option_name(key)}"
        if isinstance(value, Mapping):
            yield from _flatten_options(cast(Mapping[str, Any], value), f"{name}.")
        elif isinstance(value, bool | int | float):
            yield (*OPTIONS, name), json.dumps(value)
        else:
            yield (*OPTIONS, name), value


def _unknown(path: Path_, place: str, model: type[BaseModel]) -> str:
    near = difflib.get_close_matches(path[-1], model.model_fields, n=1)
    hint = f" Did you mean {'.'.join((*path[:-1], near[0]))}?" if near else ""
    return (
        f"There is no setting {'.'.join(path)} ({place}).{hint} "
        "`starcast config` prints all settings."
    )


# Showing ------------------------------------------------------------------------------------------


def _leaves(model: BaseModel, path: Path_ = ()) -> Iterator[tuple[Path_, Any, str]]:
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        here = (*path, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, here)
            continue
        entries = cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}
        if not entries:
            yield here, value, field.description or ""
        for key, entry in entries.items():
            yield (*here, key), entry, field.description or ""


def _field_at(path: Path_) -> pydantic.fields.FieldInfo | None:
    model: type[BaseModel] = Settings
    field = None
    for part in path:
        field = model.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type):
            break
        if issubclass(field.annotation, BaseModel):
            model = field.annotation
    return field


def _show(path: Path_, value: Any) -> str:
    """A value as it may be printed."""
    field = _field_at(path)
    secret = isinstance(value, SecretStr) or (
        field is not None and "SecretStr" in str(field.annotation)
    )
    plain = _plain(value)
    if secret and plain and path != ("redis", "url"):
        return HIDDEN
    if path[:2] == OPTIONS and len(path) > 2 and _SECRET_OPTION.search(option_name(path[-1])):
        return HIDDEN
    return hide_password(_text(plain))


def _plain(value: Any) -> Any:
    """A value, told where it is a secret."""
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
