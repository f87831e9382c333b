"""The wheel, the pinned environment, and what importing the library needs."""

import importlib
import importlib.metadata
import pathlib
import pkgutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import latentjax

ROOT = pathlib.Path(latentjax.__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
LOCKED_EXTRAS = ("train", "hub", "dev")
MODULES = sorted(module.name for module in pkgutil.walk_packages(latentjax.__path__, "latentjax."))
# Modules that are about a library outside the core; everything else must import without it.
NEEDS_MORE = {
    "latentjax.checkpoint": "Orbax",
    "latentjax.tasks.builders": "tensorflow-datasets",
}


def direct_requirements() -> list[Requirement]:
    extras = [Requirement(line) for extra in LOCKED_EXTRAS for line in PROJECT["optional-dependencies"][extra]]
    return [*CORE, *extras]


def locked() -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.lock").read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def closure(names: list[str]) -> set[str]:
    """Names of the distributions that `names` need, extras left out, themselves included."""
    found, open_names = set(), [canonicalize_name(name) for name in names]
    while open_names:
        name = open_names.pop()
        if name in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                open_names.append(canonicalize_name(requirement.name))
    return found


def test_core_dependencies_are_the_promised_ones():
    assert {requirement.name for requirement in CORE} == {"jax", "flax", "optax", "chex", "jaxtyping", "numpy"}


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_every_direct_dependency_is_pinned_once(python):
    environment = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux"}
    pins: dict[str, list[Requirement]] = {}
    for pin in locked():
        if pin.marker is None or pin.marker.evaluate(environment):
            pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    for requirement in direct_requirements():
        found = pins.get(canonicalize_name(requirement.name), [])
        assert len(found) == 1, f"{requirement.name}: {len(found)} pins for Python {python} in requirements.lock"
        (specifier,) = found[0].specifier
        assert specifier.operator == "=="
        assert requirement.specifier.contains(specifier.version), f"{found[0]} does not satisfy {requirement}"


def test_lock_names_no_host():
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert "--" not in "".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


def test_wheel_holds_latentjax_only(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling, the build backend, is not installed: make env installs it")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    metadata = f"latentjax-{latentjax.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"latentjax", metadata}
    assert f"{metadata}/licenses/LICENSE" in names
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "latentjax").rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}


def test_version_is_that_of_the_project():
    assert latentjax.__version__ == PROJECT["version"]


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_and_says_what_it_is(name):
    module = importlib.import_module(name)
    lines = pathlib.Path(module.__file__).read_text().strip()
    assert module.__doc__ or not lines, f"{name} has no docstring"


def test_library_imports_with_core_dependencies_only():
    """In a fresh process, only what the core needs can be found, and latentjax itself imports core packages only."""
    names = [requirement.name for requirement in CORE]
    distributions = importlib.metadata.packages_distributions()
    hidden = [
        package
        for package, owners in distributions.items()
        if not closure(names) & {canonicalize_name(owner) for owner in owners} and package != "latentjax"
    ]
    program = textwrap.dedent(
        """
        import builtins, importlib, importlib.machinery, sys

        core, hidden, modules = map(set, (CORE, HIDDEN, MODULES))

        class CoreOnly(importlib.machinery.PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

        def direct(name, globals=None, locals=None, fromlist=(), level=0):
            # flax brings packages that latentjax must not lean on: the importing module decides, not what is installed.
            importer, top = (globals or {}).get("__name__", ""), name.partition(".")[0]
            if importer.partition(".")[0] == "latentjax" and level == 0:
                if top not in core | sys.stdlib_module_names | {"latentjax"}:
                    raise ImportError(f"{importer} imports {name}, which is not a core dependency")
            return original(name, globals, locals, fromlist, level)

        original, builtins.__import__ = builtins.__import__, direct
        sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = CoreOnly
        failed = {}
        for module in sorted(modules):
            try:
                importlib.import_module(module)
            except ImportError as error:
                failed[module] = str(error)
        assert not failed, failed
        """
    )
    values = {"CORE": names, "HIDDEN": hidden, "MODULES": ["latentjax", *(set(MODULES) - set(NEEDS_MORE))]}
    header = "\n".join(f"{key} = {value!r}" for key, value in values.items())
    result = subprocess.run([sys.executable, "-c", header + program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
