import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from latentjax.checkpoint import (
    FOLDER,
    Checkpoints,
    DamagedCheckpoint,
    available_steps,
    fingerprint,
    load_params,
)
from latentjax.sharding import make_mesh

# Orbax leaves a coroutine behind when it fails to load; Python warns of it when the garbage is collected.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")


@pytest.fixture(autouse=True)
def _collect():
    yield
    gc.collect()


def _items(step):
    rng = np.random.default_rng(step)
    params = {"a": {"w": jnp.asarray(rng.normal(size=(40, 30)), jnp.float32)}, "b": jnp.asarray([step], jnp.int32)}
    return {"params": params, "rest": {"moments": {"w": jnp.asarray(rng.normal(size=(40, 30)), jnp.bfloat16)}}}


def _shapes():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), _items(0))


def _write(run, steps=(1, 2, 3), keep=9, accuracies=None):
    with Checkpoints(run, keep=keep) as checkpoints:
        for step in steps:
            accuracy = (accuracies or {}).get(step)
            checkpoints.save(step, _items(step), {"iterator": {"next_index": step}}, accuracy=accuracy)


def _same(found, right):
    return all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (found, right)), strict=True)
    )


def _data_files(run, step, name):
    """The largest file of an item: the one that holds the arrays."""
    files = [file for file in (run / FOLDER / str(step) / name).rglob("*") if file.is_file()]
    return max(files, key=lambda file: file.stat().st_size)


def test_what_was_saved_is_loaded(tmp_path):
    _write(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
        restored = checkpoints.load_latest(_shapes())
        assert (restored.step, dict(restored.record)) == (3, {"iterator": {"next_index": 3}})
        assert _same(dict(restored.items), _items(3))
        assert _same(dict(checkpoints.load(1, _shapes()).items), _items(1))


def test_no_checkpoint_is_none(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.load_latest(_shapes()) is None
    assert available_steps(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_params(tmp_path)


def test_donated_and_overwritten_arrays_do_not_reach_the_checkpoint(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    big = {"params": {"w": jnp.arange(3_000_000, dtype=jnp.float32)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, big, {})
        overwrite(big)
    params, _ = load_params(tmp_path)
    np.testing.assert_array_equal(params["w"], np.arange(3_000_000, dtype=np.float32))


def test_the_latest_and_the_best_are_kept(tmp_path):
    _write(tmp_path, steps=range(1, 7), keep=2, accuracies={1: 0.1, 2: 0.9, 3: 0.5, 6: 0.2})
    assert available_steps(tmp_path) == [2, 5, 6]
    assert load_params(tmp_path, "best")[1] == 2
    assert load_params(tmp_path)[1] == 6
    assert load_params(tmp_path, "5")[1] == 5


def test_of_equally_good_ones_the_latest_is_best(tmp_path):
    _write(tmp_path, steps=range(1, 5), keep=1, accuracies={1: 0.5, 2: 0.5, 3: 0.4})
    assert available_steps(tmp_path) == [2, 4]
    assert load_params(tmp_path, "best")[1] == 2


def test_an_unknown_checkpoint_lists_those_there_are(tmp_path):
    _write(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint=7.*1, 2, 3"):
        load_params(tmp_path, 7)
    with pytest.raises(ValueError, match="'best'.*validated in the last stage"):
        load_params(tmp_path, "best")


def test_parameters_are_read_alone(tmp_path):
    _write(tmp_path)
    _data_files(tmp_path, 3, "rest").unlink()
    params, step = load_params(tmp_path)
    assert step == 3
    assert _same(params, _items(3)["params"])


@pytest.mark.parametrize("name", ["params", "rest"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_a_damaged_checkpoint_is_set_aside_loudly(tmp_path, name, damage):
    _write(tmp_path)
    file = _data_files(tmp_path, 3, name)
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content)
    lines = []
    with Checkpoints(tmp_path, keep=9, report=lines.append) as checkpoints:
        restored = checkpoints.load_latest(_shapes())
        assert restored.step == 2
        assert _same(dict(restored.items), _items(2))
        checkpoints.save(3, _items(3), {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2, 3]
    assert len(lines) == 1
    assert "DAMAGED CHECKPOINT" in lines[0]
    assert (tmp_path / FOLDER / "damaged-3").is_dir()
    assert _same(load_params(tmp_path)[0], _items(3)["params"])


def test_changed_arrays_that_still_can_be_read_are_noticed(tmp_path):
    """Another checkpoint's arrays under this one's record: nothing but the checksum can tell."""
    _write(tmp_path)
    (tmp_path / FOLDER / "3" / "params").rename(tmp_path / "elsewhere")
    (tmp_path / FOLDER / "2" / "params").rename(tmp_path / FOLDER / "3" / "params")
    with pytest.raises(DamagedCheckpoint, match="params has checksum"):
        load_params(tmp_path)


def test_only_damaged_checkpoints_are_an_error(tmp_path):
    _write(tmp_path, steps=[1])
    _data_files(tmp_path, 1, "params").unlink()
    with Checkpoints(tmp_path, report=lambda _: None) as checkpoints, pytest.raises(DamagedCheckpoint, match="all"):
        checkpoints.load_latest(_shapes())


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path):
    _write(tmp_path)
    half = tmp_path / FOLDER / "4.orbax-checkpoint-tmp-0"
    (half / "params").mkdir(parents=True)
    (half / "params" / "manifest.ocdbt").write_bytes(b"half")
    assert load_params(tmp_path)[1] == 3
    assert half.exists()  # reading removes nothing: the run may be saving
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
        checkpoints.save(4, _items(4), {})
    assert not half.exists()
    assert load_params(tmp_path)[1] == 4


def test_sharded_arrays_keep_their_sharding_and_load_on_one_device(tmp_path):
    mesh = make_mesh(2, 4, 1)
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    w = jax.device_put(jnp.arange(32.0).reshape(8, 4), split)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"w": w}}, {})
        checkpoints.wait()
        like = {"params": {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=split)}}
        found = checkpoints.load(1, like).items["params"]["w"]
    assert found.sharding == split
    np.testing.assert_array_equal(found, w)
    alone, _ = load_params(tmp_path)
    assert len(alone["w"].devices()) == 1
    np.testing.assert_array_equal(alone["w"], w)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool", "uint8"])
def test_the_checksum_sees_any_one_changed_value(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 2, size=(5, 7)), dtype)
    checksums = {fingerprint({"x": x})}
    for i, j in np.ndindex(x.shape):
        changed = np.array(x)
        changed[i, j] = 1 - int(changed[i, j])
        checksums.add(fingerprint({"x": jnp.asarray(changed)}))
    assert len(checksums) == 36


def test_the_checksum_does_not_depend_on_the_sharding():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
    split = jax.device_put(x, NamedSharding(make_mesh(4, 2, 1), PartitionSpec("data", "fsdp")))
    assert fingerprint([x]) == fingerprint([split])
