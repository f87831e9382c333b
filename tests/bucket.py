"""Buckets without a cloud, as a fixture: addresses gs://BUCKET/... that work for the length of a test.

"folder": fsspec's file system of Cloud Storage and tensorstore's are replaced by folders of the local disk; the rest, all of
Orbax and etils included, believes in a bucket. "emulator": nothing is replaced, and both speak HTTP with an emulator of the
service (packages gcsfs and gcp-storage-emulator; skipped without them).
"""

import contextlib
import functools
import pathlib
import socket
import sys

import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from orbax.checkpoint._src.path import gcs_utils

BUCKET = "gs://bucket"
_AUDITED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}
_plain_calls: list[tuple] = []


@functools.cache
def _audit() -> None:
    """Python tells of every file that it opens or changes itself. A hook cannot be taken away again."""

    def hook(event: str, arguments: tuple) -> None:
        if event in _AUDITED and any("gs:/" in str(argument) for argument in arguments):
            _plain_calls.append((event, arguments))

    sys.addaudithook(hook)


class FolderAsBucket(LocalFileSystem):
    """What is at gs://BUCKET/PATH is the file root/BUCKET/PATH. `renamed` lists what was renamed, which a bucket cannot do."""

    protocol = ("gcs", "gs")
    cachable = False
    root = ""
    renamed: list[str]

    @classmethod
    def _strip_protocol(cls, path):
        name = str(path).removeprefix("gs://")
        return LocalFileSystem._strip_protocol(name if name.startswith("/") else f"{cls.root}/{name}")

    def glob(self, path, **kwargs):
        return [name.removeprefix(f"{self.root}/") for name in super().glob(path, **kwargs)]

    def mv(self, path1, path2, **kwargs):
        self.renamed.append(path1)
        super().mv(path1, path2, **kwargs)


@contextlib.contextmanager
def _fresh_file_systems():
    """etils keeps file systems for ever."""
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    yield
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()


@contextlib.contextmanager
def folder(root: pathlib.Path, patch: pytest.MonkeyPatch):
    """Buckets as folders in `root`."""

    def kvstore(address: str) -> dict[str, str]:
        return {"driver": "file", "path": f"{root}/{address.removeprefix('gs://')}"}

    patch.setattr(FolderAsBucket, "root", str(root))
    patch.setattr(FolderAsBucket, "renamed", [], raising=False)
    patch.setattr(gcs_utils, "get_kvstore_for_gcs", kvstore)
    patch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    for protocol in FolderAsBucket.protocol:
        patch.setitem(_registry, protocol, FolderAsBucket)
    with _fresh_file_systems():
        yield


@contextlib.contextmanager
def emulator(patch: pytest.MonkeyPatch):
    """One bucket, in the memory of an emulator."""
    server = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcp-storage-emulator and gcsfs")
    gcsfs = pytest.importorskip("gcsfs", reason="needs gcsfs")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for variable in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        patch.setenv(variable, f"http://localhost:{port}")
    patch.setenv("GOOGLE_CLOUD_PROJECT", "none")
    patch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)  # caches a client
    gcsfs.GCSFileSystem.clear_instance_cache()
    running = server.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    running.start()
    try:
        with _fresh_file_systems():
            yield
    finally:
        gcsfs.GCSFileSystem.clear_instance_cache()
        running.stop()


@pytest.fixture(params=["folder", pytest.param("emulator", marks=pytest.mark.slow)])
def bucket(request, tmp_path, monkeypatch):
    """The address of an empty folder of a bucket, as epath. No plain call on an address may have been made at the end."""
    _audit()
    _plain_calls.clear()
    opened = emulator(monkeypatch) if request.param == "emulator" else folder(tmp_path / "buckets", monkeypatch)
    with opened:
        yield epath.Path(BUCKET) / "runs" / "one"
    assert not _plain_calls
