"""Settings that every test shares; those of JAX must be set before JAX is imported."""

import os
import pathlib

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Subprocesses of tests inherit the cache, so that a program is compiled once for all of them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(REPOSITORY / ".cache" / "hypothesis"))

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_threefry_partitionable", True)
jax.config.update("jax_default_matmul_precision", "highest")

# The same examples in every run, and no limit of time: the machine may be busy.
hypothesis.settings.register_profile("latentjax", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("latentjax")

# Shapes and types in signatures are checked at run time under pytest only. The hook stays installed for the session.
install_import_hook(["latentjax", "train", "eval"], "beartype.beartype")


@pytest.fixture(autouse=True, scope="module")
def _release_programs():
    """Each compiled program holds hundreds of memory mappings, and Linux aborts a process that wants more than 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def published() -> pathlib.Path:
    """The folder of published data: $LATENTJAX_DATA, or `shared/data` beside the checkout. Skips where it is absent."""
    folder = pathlib.Path(os.environ.get("LATENTJAX_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("published data absent: set LATENTJAX_DATA to the folder that holds it")
    return folder
