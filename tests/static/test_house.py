"""What is written in two places says the same in both."""

from __future__ import annotations

import re

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.static.project import PACKAGE, PROJECT, ROOT

SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_development_versions_are_pinned_and_allowed() -> None:
    lines = (ROOT / "constraints-dev.txt").read_text().splitlines()
    pins = {}
    for line in filter(None, (line.partition("#")[0].strip() for line in lines)):
        name, version = line.split("==")
        pins[canonicalize_name(name)] = version
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *(r for extra in extras.values() for r in extra)]:
        requirement = Requirement(text)
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_dependencies_have_lower_bounds_only() -> None:
    """Installing this must never replace the torch that is there."""
    for text in PROJECT["dependencies"]:
        assert [spec.operator for spec in Requirement(text).specifier] == [">="], text


def test_environment_variables_are_read_in_one_module_and_documented() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in SOURCES:
        text = path.read_text()
        if path.name != "settings.py":
            assert not re.search(r"os\.(environ|getenv)", text), path
        for name in re.findall(r"SEQKERNELS_[A-Z]+", text):
            assert f"`{name}`" in readme or f"`{name}=" in readme, name


def test_changelog_has_this_version_or_is_ahead_of_it() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in ("Unreleased", PROJECT["version"])


def test_package_knows_its_version() -> None:
    import seqkernels

    assert seqkernels.__version__ == PROJECT["version"]
