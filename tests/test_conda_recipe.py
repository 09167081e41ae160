"""The conda recipe agrees with pyproject.toml; rattler-build, where installed, renders it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pyloss

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "packaging" / "conda" / "recipe.yaml"
# Packages that conda has under another name.
NAMES = {"torch": "pytorch"}


@pytest.fixture(scope="module")
def recipe() -> dict:
    return pytest.importorskip("yaml").safe_load(RECIPE.read_text())


@pytest.fixture(scope="module")
def project() -> dict:
    return pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())


def for_conda(requirements: list[str]) -> set[str]:
    """pip's requirements as conda writes them."""
    found = set()
    for line in requirements:
        name, bound = re.fullmatch(r"([\w-]+)\s*(.*)", line).groups()
        found.add(f"{NAMES.get(name, name)} {bound}".strip())
    return found


def test_names_versions_license(recipe: dict, project: dict) -> None:
    described = project["project"]
    assert recipe["package"]["name"] == described["name"]
    assert recipe["context"]["version"] == described["version"]
    about = recipe["about"]
    assert about["homepage"] == described["urls"]["Repository"]
    assert about["license"] == described["license"]
    assert [about["license_file"]] == described["license-files"]
    assert about["summary"] == described["description"]
    assert (RECIPE.parent / recipe["source"]["path"]).resolve() == ROOT
    (oldest,) = re.findall(r">=([\d.]+)", described["requires-python"])
    assert f'match(python, "<{oldest}")' in recipe["build"]["skip"]


def test_requirements(recipe: dict, project: dict) -> None:
    wanted = recipe["requirements"]
    assert set(wanted["run"]) == {"python", *for_conda(project["project"]["dependencies"])}
    tools = {r for r in wanted["build"] if "${{" not in r}
    building = for_conda(project["build-system"]["requires"])
    assert {*wanted["host"], *tools} == {"python", "pip", *building}


def test_rattler_build_renders_it() -> None:
    rattler_build = pytest.importorskip("rattler_build")
    variants = {"python": ["3.12"], "c_stdlib": ["sysroot"], "c_stdlib_version": ["2.28"]}
    found = rattler_build.Stage0Recipe.from_file(str(RECIPE))
    (one,) = found.render(rattler_build.VariantConfig(variants))
    assert one.recipe.package.version == pyloss.__version__
    assert "pytorch >=2.6" in one.recipe.requirements.run
