"""Checkpoints in a bucket, where nothing can be renamed and a mark is written last."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.checkpoint import ADDRESS, FOLDER, RECORD, Checkpoints, NotSaved, available_steps, load_params
from tests.bucket import FolderAsBucket, bucket  # noqa: F401  # a fixture

_MARK = "commit_success.txt"


def _items(step):
    rng = np.random.default_rng(step)
    params = {"w": jnp.asarray(rng.normal(size=(40, 30)), jnp.float32), "b": jnp.asarray([step], jnp.int32)}
    return {"params": params, "rest": {"moments": jnp.asarray(rng.normal(size=(40, 30)), jnp.bfloat16)}}


def _shapes():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), _items(0))


def _same(found, right):
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (found, right)), strict=True))


@pytest.fixture
def run(tmp_path, bucket):  # noqa: F811
    """A run whose checkpoints 1, 2 and 3 are in the bucket."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ADDRESS).write_text(f"{bucket}\n")
    with Checkpoints(run, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, _items(step), {"next": step}, accuracy=0.9 if step == 1 else 0.5)
    return run


def test_what_was_saved_is_loaded(run, bucket):  # noqa: F811
    assert [path.name for path in run.iterdir()] == [ADDRESS]
    assert sorted(path.name for path in bucket.iterdir()) == ["1", "2", "3"]
    assert available_steps(run) == [1, 2, 3]
    params, step = load_params(run, "best")
    assert step == 1 and _same(params, _items(1)["params"])
    with Checkpoints(run, keep=1) as checkpoints:
        restored = checkpoints.load_latest(_shapes())
        assert restored.step == 3 and dict(restored.record) == {"next": 3} and _same(dict(restored.items), _items(3))
        checkpoints.save(4, _items(4), {})
    assert available_steps(run) == [1, 4]  # the best and the latest


def test_nothing_is_renamed_to_save(tmp_path, run, bucket, request):  # noqa: F811
    if "folder" not in request.node.name:
        pytest.skip("only the folder tells")
    assert FolderAsBucket.renamed == []
    local = tmp_path / "buckets" / "bucket" / "runs" / "one"
    assert (
        not list(local.glob("**/*tmp*")) and not (pathlib.Path.cwd() / "gs:").exists() and not (run / FOLDER).exists()
    )


def test_without_its_mark_a_checkpoint_is_none(run, bucket):  # noqa: F811
    (bucket / "3" / _MARK).unlink()
    assert available_steps(run) == [1, 2]
    with Checkpoints(run, keep=3) as checkpoints:
        assert checkpoints.load_latest(_shapes()).step == 2
        checkpoints.save(3, _items(7), {})
    assert available_steps(run) == [1, 2, 3]
    assert _same(load_params(run, 3)[0], _items(7)["params"])


@pytest.mark.parametrize("file", [RECORD, "params/_METADATA"])
def test_a_damaged_checkpoint_is_set_aside(run, bucket, file):  # noqa: F811
    damaged = bucket / "3" / file
    content = damaged.read_text()
    damaged.write_text(content.replace(content[20], chr(ord(content[20]) ^ 1)))
    lines = []
    with Checkpoints(run, keep=3, report=lines.append) as checkpoints:
        assert checkpoints.load_latest(_shapes()).step == 2
    assert "DAMAGED CHECKPOINT" in lines[0]
    assert sorted(path.name for path in bucket.iterdir()) == ["1", "2", "damaged-3"]


def test_a_bucket_out_of_reach_is_a_checkpoint_not_saved(run, bucket, request, monkeypatch):  # noqa: F811
    if "folder" not in request.node.name:
        pytest.skip("the emulator stays")
    checkpoints = Checkpoints(run, keep=3)

    def fail(*arguments, **options):
        raise ConnectionError("no route to host")

    with monkeypatch.context() as patch:
        for name in ("ls", "info", "exists", "isdir"):
            patch.setattr(FolderAsBucket, name, fail)
        with pytest.raises(NotSaved, match=f"{bucket}/4 could not be written: ConnectionError"):
            checkpoints.save(4, _items(4), {})
    checkpoints.close()
    assert available_steps(run) == [1, 2, 3]
