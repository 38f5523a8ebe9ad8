"""Command-line words to a plain mapping, through Hydra, with error messages of our own.

Hydra composes and parses; before it does, every override is compared with what the YAML files in
``cmpolicy_conf`` hold, so that a slip is answered with the nearest setting.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cmpolicy.schema import ConfigError, from_mapping, unknown_key_message

T = TypeVar("T")

PACKAGE = "cmpolicy_conf"
HYDRA_VERSION_BASE = "1.3"
#: Groups of settings whose keys are the user's own.
OPEN_GROUPS = ("data.obs",)
HOW = "`--help` lists all settings with their values"


def compose_settings(
    config_name: str, words: Sequence[str], *, package: str = PACKAGE
) -> dict[str, Any]:
    """Settings of ``<config_name>.yaml`` with ``words`` such as ``net=tiny`` or ``optim.lr=1e-3``.

    Args:
        config_name: the YAML file.
        words: as typed.
        package: the folder of the YAML file, its groups in it; groups that it lacks are those of
            ``cmpolicy_conf`` if the file's ``hydra.searchpath`` says so.

    Raises:
        ConfigError: a word that cannot be read, an unknown group, choice or setting.
    """
    overrides = parse(words)
    groups = _groups(config_name, package)
    choices = [o for o in overrides if o.key_or_group in groups]
    for override in choices:
        _check_choice(override, groups[override.key_or_group])
    chosen = {o.key_or_group for o in choices}
    known = _known_keys(config_name, package, tuple(str(o.input_line) for o in choices))
    for override in overrides:
        key = override.key_or_group
        if key not in chosen and not override.is_add() and not _is_known(key, known):
            group = key.partition(".")[0]
            if group in groups and not any(k.startswith(f"{group}.") for k in known):
                raise ConfigError(
                    f"{key} is set, but no {group} is chosen; add {group}={'|'.join(groups[group])}"
                )
            leaves = [k for k in known if not any(o.startswith(f"{k}.") for o in known)]
            raise ConfigError(unknown_key_message(key, [*leaves, *groups], how=HOW))
    # Hydra would merge a mapping of the user's own into the one of the chosen group
    replaced = [o for o in overrides if o.key_or_group in OPEN_GROUPS and _is_plain(o)]
    merged = [str(o.input_line) for o in overrides if o not in replaced]
    return apply(_container(_compose(config_name, package, merged)), replaced)


def parse(words: Iterable[str]) -> list[Override]:
    """Hydra's reading of ``key=value`` words.

    Raises:
        ConfigError: a word without ``=``, or one that Hydra's grammar does not know.
    """
    parser = OverridesParser.create()
    overrides = []
    for word in words:
        if "=" not in word and not word.startswith("~"):
            raise ConfigError(f"{word!r} is not a setting; settings are given as key=value. {HOW}")
        try:
            override = parser.parse_override(word)
        except HydraException as error:
            raise ConfigError(
                f"cannot read {word!r}: quote values that hold spaces or any of , : = [ ] {{ }}, "
                f"as in 'key=\"a value\"' ({str(error).splitlines()[0]})"
            ) from error
        if override.is_sweep_override():
            raise ConfigError(f"{word!r} gives several values: add --multirun for one run of each")
        overrides.append(override)
    return overrides


def apply(settings: Mapping[str, Any], overrides: Iterable[Override]) -> dict[str, Any]:
    """Finished settings with some values replaced; used for a run that is resumed."""
    config = OmegaConf.create(dict(settings))
    for override in overrides:
        OmegaConf.update(config, override.key_or_group, override.value(), merge=False)
    return _container(config)


def read_words(words: Iterable[str]) -> dict[str, Any]:
    """``key=value`` words as a mapping, for commands without groups; values are read as YAML.

    Raises:
        ConfigError: a word without ``=``, or a value that is not YAML.
    """
    settings: dict[str, Any] = {}
    for word in words:
        if not word.partition("=")[0] or "=" not in word:
            raise ConfigError(f"{word!r} is not a setting; settings are given as key=value")
        try:
            read = OmegaConf.to_container(OmegaConf.from_dotlist([word]), resolve=True)
        except Exception as error:  # omegaconf's own, or of the YAML reader below it
            reason = " ".join(str(error).split())
            raise ConfigError(f"cannot read {word!r}: its value is not YAML ({reason})") from error
        settings |= {str(k): v for k, v in read.items()} if isinstance(read, dict) else {}
    return settings


def read(cls: type[T], words: Sequence[str]) -> T:
    """``key=value`` words as the settings ``cls``.

    Raises:
        ConfigError: a word that is no key=value, an unknown or missing key, a bad value.
    """
    return from_mapping(cls, read_words(words))


def split(cls: type[T], words: Sequence[str]) -> tuple[T, list[str]]:
    """As :func:`read` of the words that are keys of ``cls``, and the other words.

    Raises:
        ConfigError: see :func:`read`.
    """
    own = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    mine = [word for word in words if word.partition("=")[0] in own]
    return read(cls, mine), [word for word in words if word not in mine]


@cache
def _known_keys(config_name: str, package: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    """All dotted keys there are with these choices, of groups and of single settings."""
    config = _compose(config_name, package, choices)
    return tuple(_keys(OmegaConf.to_container(config, resolve=False)))


def _compose(
    config_name: str, package: str, words: Sequence[str], *, with_hydra: bool = False
) -> DictConfig:
    # a caller's own Hydra state, such as that of --multirun, is put back afterwards
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(package, version_base=HYDRA_VERSION_BASE):
            return compose(config_name, list(words), return_hydra_config=with_hydra)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from error
    finally:
        GlobalHydra.instance().hydra = before


def _container(config: DictConfig) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    if not isinstance(plain, dict):
        raise ConfigError("the settings are not a mapping")
    return {str(key): value for key, value in plain.items()}


@cache
def _groups(config_name: str, package: str) -> dict[str, list[str]]:
    """Choices by group, of the groups in the defaults list: the YAML files in its folder."""
    composed = _compose(config_name, package, (), with_hydra=True)
    chosen = [str(group) for group in composed.hydra.runtime.choices if "/" not in group]
    return {group: _choices(group, package) for group in chosen}


def _choices(group: str, package: str) -> list[str]:
    roots = [files(package), files(PACKAGE)]
    folder = next(root / group for root in roots if (root / group).is_dir())
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if _yaml(f.name))


def _yaml(name: str) -> bool:
    return name.endswith(".yaml")


def _check_choice(override: Override, choices: Sequence[str]) -> None:
    group, value = override.key_or_group, override.value()
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {group}={near[0]}?" if near else ""
    raise ConfigError(f"unknown choice {group}={value}{hint}\n{group} is one of {list(choices)}")


def _keys(config: object, prefix: str = "") -> list[str]:
    """The dotted keys of a mapping."""
    if not isinstance(config, Mapping):
        return []
    found: list[str] = []
    for key, value in config.items():
        found += [f"{prefix}{key}", *_keys(value, f"{prefix}{key}.")]
    return found


def _is_plain(override: Override) -> bool:
    """Whether it is ``key=value``, neither ``+key=value`` nor ``~key``."""
    return not (override.is_add() or override.is_delete() or override.is_force_add())


def _is_known(key: str, known: Sequence[str]) -> bool:
    is_open = any(key.startswith(f"{group}.") for group in OPEN_GROUPS)
    return key in known or is_open or key.startswith("hydra.") or key == "hydra"
