"""Command-line words to settings: Hydra's grammar and groups, with error messages of our own.

``key=value`` words are read by Hydra's parser. Group choices (``task=lift``, ``net=tiny``) compose
the YAML files of ``cmpolicy_conf``, which hold only what differs from the defaults of the settings'
dataclasses; the dataclasses fill in the rest, and the other words replace single values.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, partial
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cmpolicy.schema import OWN, ConfigError, complete, from_mapping, unknown_key_message

T = TypeVar("T")

PACKAGE = "cmpolicy_conf"
HYDRA_VERSION_BASE = "1.3"
SEARCH_PATH = "hydra.searchpath"
HOW = "`--help` lists all settings with their values"


@dataclass(frozen=True)
class Composition:
    """Which YAML file, in which package, makes settings of which dataclass.

    A dataclass with a ``complete`` classmethod is asked for the defaults itself.
    ``extra`` are settings of the command itself, such as ``out``, with their defaults; ``text``
    names those that are text whatever they look like. ``open_groups`` have keys of the user's own.
    ``kinds`` are groups whose choices may also be entries of a registry: the setting that names the
    entry, and the registry. ``hydra.searchpath=[folder]`` adds YAML files of the user's own.
    """

    settings: type[Any]
    config_name: str = "train"
    package: str = PACKAGE
    extra: Mapping[str, Any] = field(default_factory=lambda: {"out": None})
    text: Sequence[str] = (
        *("out", "resume", "init", "data.path", "data.repo_id", "data.revision"),
        *("dataset.path", "task.name"),
    )
    open_groups: Sequence[str] = ("data.obs", "data.targets", "data.normalize")
    kinds: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)

    def files(self, places: Sequence[str] = ()) -> dict[str, list[str]]:
        """Choices by group that are YAML files, of the groups in the defaults list."""
        return _groups(self.config_name, self.package, tuple(places))

    def groups(self, places: Sequence[str] = ()) -> dict[str, list[str]]:
        """All choices by group."""
        files = self.files(places)
        names = {group: self.kinds.get(group, ("", {}))[1] for group in files}
        return {group: sorted({*files[group], *names[group]}) for group in files}

    def compose(self, words: Sequence[str]) -> dict[str, Any]:
        """All settings with these words: the command's own and those of :attr:`settings`.

        Raises:
            ConfigError: a word that cannot be read, an unknown group, choice or setting.
        """
        overrides = [*map(self._choice, parse(words))]
        places = search_path(overrides)
        files, groups = self.files(places), self.groups(places)
        choices = [o for o in overrides if o.key_or_group in groups]
        for override in choices:
            group = override.key_or_group
            _check_choice(override, groups[group], OWN if group in self.kinds else "")
        in_files = [o for o in choices if o.value() in files[o.key_or_group]]
        lines = [f"{o.key_or_group}={o.value()}" for o in in_files]
        composed = _container(_compose(self.config_name, self.package, lines, places))
        for override in choices:
            if override not in in_files:
                group = override.key_or_group
                composed[group] = {self.kinds[group][0]: override.value()}
        filled = getattr(self.settings, "complete", partial(complete, self.settings))
        whole = {**self.extra, **filled(composed)}
        rest = [o for o in overrides if o not in choices and o.key_or_group != SEARCH_PATH]
        return self.replace(whole, rest)

    def _choice(self, override: Override) -> Override:
        """``net.kind=unet1d`` is ``net=unet1d``, whose other settings are its own."""
        for group, (name, _) in self.kinds.items():
            if override.key_or_group == f"{group}.{name}":
                return OverridesParser.create().parse_override(f"{group}={override.value()}")
        return override

    def replace(self, settings: Mapping[str, Any], overrides: Iterable[Override]) -> dict[str, Any]:
        """Finished settings with some values replaced.

        Raises:
            ConfigError: an unknown setting, with the nearest known ones.
        """
        config = OmegaConf.create(dict(settings))
        known = _keys(settings)
        for override in overrides:
            key = override.key_or_group
            opened = [group for group in self.open_groups if key.startswith(f"{group}.")]
            for group in opened:  # a list of keys stands for each by its own name
                if isinstance(names := OmegaConf.select(config, group), ListConfig):
                    OmegaConf.update(config, group, {n: n for n in names}, merge=False)
            if key not in known and not opened:
                group = key.partition(".")[0]
                groups = self.groups()
                if settings.get(group) is None and group in groups:
                    raise ConfigError(
                        f"{key} is set, but no {group} is chosen; add "
                        f"{group}={'|'.join(groups[group])}"
                    )
                leaves = [k for k in known if not any(o.startswith(f"{k}.") for o in known)]
                how = self._elsewhere(key) or HOW
                raise ConfigError(unknown_key_message(key, [*leaves, *groups], how=how))
            OmegaConf.update(config, key, self._value(override), merge=False)
        return _container(config)

    def _elsewhere(self, key: str) -> str:
        """Which other choices of its group have a setting; empty where none has."""
        group, _, name = key.partition(".")
        known = self.kinds.get(group, ("", {}))[1].items()
        having = sorted(kind for kind, cls in known if name in cls.__dataclass_fields__)
        return f"{name} is a setting of {group}={'|'.join(having)}" if having else ""

    def values(self, overrides: Iterable[Override]) -> dict[str, Any]:
        """The values of settings by key, of words that compose nothing."""
        return {override.key_or_group: self._value(override) for override in overrides}

    def _value(self, override: Override) -> Any:
        is_text = override.key_or_group in self.text
        return _plain(_text(override) if is_text else override.value())

    def help(self, header: str, words: Sequence[str]) -> str:
        """The groups with their choices and all settings with their values."""
        settings = self.compose(words)
        found = self.groups(search_path(parse(words)))
        groups = "\n".join(f"  {name}: {', '.join(choices)}" for name, choices in found.items())
        return (
            f"{header}\n\ngroups, one choice each (such as {next(iter(found))}=...):\n"
            f"{groups}\n\nsettings and their values, each given as key=value:\n"
            + OmegaConf.to_yaml(OmegaConf.create(settings))
        )


def parse(words: Iterable[str]) -> list[Override]:
    """Hydra's reading of ``key=value`` words, one value each.

    Raises:
        ConfigError: several values, or as :func:`parse_sweep`.
    """
    overrides = parse_sweep(words)
    for override in overrides:
        if override.is_sweep_override():
            key, _, value = str(override.input_line).partition("=")
            raise ConfigError(
                f"'{key}={value}' gives several values: write {key}=[{value}] for a list; "
                "`cmpolicy train` makes one run of each with --multirun"
            )
    return overrides


def parse_sweep(words: Iterable[str]) -> list[Override]:
    """Hydra's reading of ``key=value`` words, which may give several values.

    Raises:
        ConfigError: a word without ``=``, or one that Hydra's grammar does not know.
    """
    parser = OverridesParser.create()
    overrides = []
    for word in words:
        if "=" not in word or word.startswith("~"):
            raise ConfigError(f"{word!r} is not a setting; settings are given as key=value. {HOW}")
        try:
            overrides.append(parser.parse_override(word))
        except HydraException as error:
            found = _plain_text(word)
            if found is None:
                raise ConfigError(
                    f"cannot read {word!r}: quote values that hold spaces, letters beyond ASCII or "
                    f"any of , : = [ ] {{ }} ( ), as in 'key=\"a value\"'; such names as keys of "
                    "{...} cannot be quoted and go into a task file "
                    f"(cmpolicy/training/README.md) ({str(error).splitlines()[0]})"
                ) from error
            overrides.append(found)
    return overrides


def read(cls: type[T], words: Sequence[str]) -> T:
    """``key=value`` words as the dataclass ``cls``, for commands without groups.

    A field of type ``str`` takes the value as text, whatever it looks like: ``out=2024`` is a name.

    Raises:
        ConfigError: a word that is no key=value, an unknown or missing key, a bad value.
    """
    hints = get_type_hints(cls)
    known = [item.name for item in fields(cls)]  # type: ignore[arg-type]
    settings: dict[str, Any] = {}
    for override in parse(words):
        key = override.key_or_group
        if key not in known:
            raise ConfigError(unknown_key_message(key, known, how=HOW))
        value = _text(override) if _is_text(hints[key]) else override.value()
        settings[key] = _plain(value)
    return from_mapping(cls, settings)


def split(cls: type[T], words: Sequence[str]) -> tuple[T, list[str]]:
    """As :func:`read` of the words that are keys of ``cls``, and the other words.

    Raises:
        ConfigError: see :func:`read`.
    """
    own = {item.name for item in fields(cls)}  # type: ignore[arg-type]
    mine = [word for word in words if word.partition("=")[0] in own]
    return read(cls, mine), [word for word in words if word not in mine]


def describe(cls: type[Any], header: str) -> str:
    """Help of a command: its header, then every setting with its default and meaning.

    The meanings are those of the ``Args`` section of the docstring of ``cls``.
    """
    meanings = _meanings(cls.__doc__ or "")
    defaults = complete(cls, {})
    lines = [f"  {_setting(name, defaults[name]):<24}{meanings.get(name, '')}" for name in defaults]
    return f"{header.rstrip()}\n\nsettings, given as key=value, and their defaults:\n" + "\n".join(
        line.rstrip() for line in lines
    )


def _setting(name: str, value: Any) -> str:
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
    if isinstance(value, list):
        shown = f"[{','.join(map(str, value))}]"
    return f"{name}={shown}"


def _meanings(docstring: str) -> dict[str, str]:
    """The entries of a docstring's ``Args`` section, each as one text."""
    found: dict[str, str] = {}
    names: list[str] = []
    lines = docstring.partition("Args:\n")[2].splitlines()
    for line in lines:
        stripped, depth = line.strip(), len(line) - len(line.lstrip())
        if stripped and depth <= 4:
            break  # the next section
        if depth == 8 and ":" in stripped:
            keys, _, text = stripped.partition(":")
            names = [key.strip() for key in keys.split(",")]
            found |= dict.fromkeys(names, text.strip())
        elif stripped:
            found |= {name: f"{found[name]} {stripped}" for name in names}
    return found


def _plain_text(word: str) -> Override | None:
    """``key=value`` with letters that Hydra's grammar lacks: accents, and a path's leading ~."""
    key, _, value = word.partition("=")
    if not value or set(value) & set("\"',=[]{}()$ \t"):
        return None
    if value.isascii() and not value.startswith("~"):
        return None
    return OverridesParser.create().parse_override(f"{key}='{value}'")


def _text(override: Override) -> str | None:
    """The value as it was typed, without quotes; None for null."""
    value = override.value()
    if value is None:
        return None
    if isinstance(value, QuotedString):
        return str(value.text)
    if isinstance(value, str):
        return value
    return str(override.input_line).partition("=")[2]


def _plain(value: Any) -> Any:
    """A value without its quotes."""
    return value.text if isinstance(value, QuotedString) else value


def _is_text(hint: Any) -> bool:
    """Whether a type hint is ``str`` or ``str | None``."""
    if get_origin(hint) in (Union, types.UnionType):
        return all(a in (str, type(None)) for a in get_args(hint))
    return hint is str


def search_path(overrides: Iterable[Override]) -> list[str]:
    """``hydra.searchpath`` of the words, as Hydra wants it: a plain folder is ``file://folder``.

    Raises:
        ConfigError: no list, or a folder that is not there.
    """
    given = [o.value() for o in overrides if o.key_or_group == SEARCH_PATH]
    if not given:
        return []
    if not isinstance(given[-1], list):
        raise ConfigError(f"{SEARCH_PATH}={given[-1]} must be a list: {SEARCH_PATH}=[conf]")
    places = [str(_plain(place)) for place in given[-1]]
    places = [place if "://" in place else f"file://{Path(place).absolute()}" for place in places]
    for place in places:
        if place.startswith("file://") and not Path(place.removeprefix("file://")).is_dir():
            raise ConfigError(f"{SEARCH_PATH}: {place} is no folder")
    return places


def _compose(
    config_name: str,
    package: str,
    words: Sequence[str],
    places: Sequence[str] = (),
    *,
    with_hydra: bool = False,
) -> DictConfig:
    # a caller's own Hydra state, such as that of --multirun, is put back afterwards
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(package, version_base=HYDRA_VERSION_BASE):
            where = [f"{SEARCH_PATH}={list(places)}"] if places else []
            return compose(config_name, [*words, *where], return_hydra_config=with_hydra)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from error
    finally:
        GlobalHydra.instance().hydra = before


def _container(config: DictConfig) -> dict[str, Any]:
    try:
        found = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    if not isinstance(found, dict):
        raise ConfigError("the settings are not a mapping")
    return {str(key): value for key, value in found.items()}


@cache
def _groups(config_name: str, package: str, places: tuple[str, ...]) -> dict[str, list[str]]:
    composed = _compose(config_name, package, (), with_hydra=True)
    chosen = [str(group) for group in composed.hydra.runtime.choices if "/" not in group]
    return {group: _choices(group, package, places) for group in chosen}


def _choices(group: str, package: str, places: Sequence[str]) -> list[str]:
    roots = [files(package), files(PACKAGE)]
    own: list[Traversable] = [
        Path(p.removeprefix("file://")) for p in places if p.startswith("file://")
    ]
    own += [files(p.removeprefix("pkg://")) for p in places if p.startswith("pkg://")]
    folders: list[Traversable] = [next(root / group for root in roots if (root / group).is_dir())]
    folders += [place / group for place in own if (place / group).is_dir()]
    names = [entry.name for folder in folders for entry in folder.iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def _check_choice(override: Override, choices: Sequence[str], how: str) -> None:
    group, value = override.key_or_group, override.value()
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {group}={near[0]}?" if near else ""
    lines = [f"unknown choice {group}={value}{hint}", f"{group} is one of {list(choices)}"]
    raise ConfigError("\n".join([*lines, how] if how else lines))


def _keys(config: object, prefix: str = "") -> list[str]:
    """The dotted keys of a mapping."""
    if not isinstance(config, Mapping):
        return []
    found: list[str] = []
    for key, value in config.items():
        found += [f"{prefix}{key}", *_keys(value, f"{prefix}{key}.")]
    return found
