"""What the package says of itself: version, dependencies, pins and console scripts."""

import ast
import re
import sys
import tomllib
from importlib.metadata import EntryPoint, distribution, entry_points, packages_distributions
from pathlib import Path
from typing import Any

import pytest

import cmpolicy

ROOTS = ("cmpolicy", "envs", "data", "eval", "conf")
SCRIPTS = ("cmpolicy",)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _name(requirement: str) -> str:
    return _canonical(re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0])


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


def test_version_is_the_newest_of_the_changelog(repository: Path) -> None:
    newest = re.search(r"^## \[([^\]]+)\]", (repository / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == cmpolicy.__version__
    assert distribution("cmpolicy").version == cmpolicy.__version__


def _script(name: str) -> EntryPoint:
    (found,) = entry_points(group="console_scripts", name=name)
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_console_script_resolves(name: str) -> None:
    assert callable(_script(name).load())


def test_console_scripts_are_all_listed(project: dict[str, Any]) -> None:
    assert set(project["scripts"]) == set(SCRIPTS)


def _imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_every_import_is_a_declared_dependency(repository: Path, project: dict[str, Any]) -> None:
    extras = {k: v for k, v in project["optional-dependencies"].items() if k not in ("all", "dev")}
    declared = {_name(r) for needs in (project["dependencies"], *extras.values()) for r in needs}
    of_module = packages_distributions()
    of_module["rerun"] = ["rerun-sdk"]  # a .pth file puts its folder rerun_sdk on the path
    undeclared: dict[str, list[str]] = {}
    for root in ROOTS:
        for file in sorted((repository / root).rglob("*.py")):
            for module in _imports(file) - set(sys.stdlib_module_names):
                owners = {_canonical(owner) for owner in of_module.get(module, [module])}
                if not module.startswith("cmpolicy") and not owners & declared:
                    undeclared.setdefault(module, []).append(str(file.relative_to(repository)))
    assert undeclared == {}


def test_constraints_pin_every_dependency_by_version_alone(
    repository: Path, project: dict[str, Any]
) -> None:
    lines = (repository / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    shape = re.compile(r"^[A-Za-z0-9._-]+==[A-Za-z0-9.!]+( ; [a-z_]+ (<|>=|==) \"[a-z0-9.]+\")?$")
    assert [pin for pin in pins if not shape.match(pin)] == []
    wanted = {_name(requirement) for requirement in project["dependencies"]}
    for extra in project["optional-dependencies"].values():
        wanted |= {_name(requirement) for requirement in extra} - {"cmpolicy"}
    assert wanted - {_name(pin) for pin in pins} == set()


def test_lazy_exports() -> None:
    assert cmpolicy.ConsistencyPolicy.__module__ == "cmpolicy.policy.policy"
    with pytest.raises(AttributeError, match="no attribute 'ConsistentPolicy'"):
        _ = cmpolicy.ConsistentPolicy  # type: ignore[attr-defined]
