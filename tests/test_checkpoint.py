import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from latentjax import checkpoint
from latentjax.checkpoint import (
    FOLDER,
    RECORD,
    Checkpoints,
    DamagedCheckpoint,
    NotSaved,
    OtherArrays,
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


def _damage(file, damage, rng):
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: int(rng.integers(len(content)))])
    else:
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(content)


@pytest.mark.parametrize("name", ["params", "rest"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_a_damaged_checkpoint_is_set_aside_loudly(tmp_path, name, damage):
    _write(tmp_path)
    _damage(_data_files(tmp_path, 3, name), damage, np.random.default_rng(0))
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


def _damages_noticed(tmp_path, flips, rng):
    """Damage every file of a checkpoint in turn; the numbers of damages and of those that made an earlier one load."""
    whole = tmp_path / "whole"
    _write(whole, steps=(1, 2), accuracies={1: 0.25, 2: 0.5})
    newest = whole / FOLDER / "2"
    tried = noticed = 0
    for name in sorted(str(file.relative_to(newest)) for file in newest.rglob("*") if file.is_file()):
        for damage in ("missing", "truncated", *("flipped",) * flips):
            run, lines = tmp_path / "run", []
            shutil.copytree(whole, run)
            _damage(run / FOLDER / "2" / name, damage, rng)
            with Checkpoints(run, report=lines.append) as checkpoints:
                restored = checkpoints.load_latest(_shapes())
            tried, fell_back = tried + 1, restored.step == 1
            noticed += fell_back
            assert dict(restored.record) == {"iterator": {"next_index": restored.step}}
            assert _same(dict(restored.items), _items(restored.step))
            assert fell_back == bool(lines), (name, damage)
            # What Orbax writes after the record: a mark that is not read, and times and class names beside the items.
            assert fell_back or name in ("commit_success.txt", "_CHECKPOINT_METADATA"), (name, damage)
            shutil.rmtree(run)
    return tried, noticed


def test_damage_of_any_file_is_noticed(tmp_path):
    tried, noticed = _damages_noticed(tmp_path, 1, np.random.default_rng(0))
    assert tried >= 3 * 19
    assert noticed >= tried - 4  # the mark, and one bit


@pytest.mark.slow
def test_any_flipped_bit_of_any_file_is_noticed(tmp_path, capsys):
    tried, noticed = _damages_noticed(tmp_path, 20, np.random.default_rng(1))
    with capsys.disabled():
        print(f"\n{tried} damages, {noticed} noticed, 0 loaded with another content")
    assert tried >= 22 * 19
    assert noticed >= tried - 2 * 22  # the mark that is not read, and times and class names beside the items


def test_a_damaged_record_neither_hides_the_best_checkpoint_nor_changes_it(tmp_path):
    _write(tmp_path, steps=(1, 2, 3), accuracies={1: 0.1, 2: 0.9, 3: 0.5})
    record = tmp_path / FOLDER / "3" / RECORD
    record.write_text(record.read_text().replace("0.5", "0.95"))
    with pytest.raises(DamagedCheckpoint, match="record.json is not as it was saved"):
        load_params(tmp_path, "best")
    lines = []
    with Checkpoints(tmp_path, report=lines.append):
        assert len(lines) == 1
    assert load_params(tmp_path, "best")[1] == 2


def test_an_empty_checkpoint_folder_is_a_damaged_one(tmp_path):
    _write(tmp_path)
    (tmp_path / FOLDER / "4").mkdir()
    lines = []
    with Checkpoints(tmp_path, report=lines.append) as checkpoints:
        assert checkpoints.load_latest(_shapes()).step == 3
    assert "checkpoints/4 cannot be read" in lines[0]


def test_what_an_interrupted_deletion_left_is_removed(tmp_path):
    _write(tmp_path)
    (tmp_path / FOLDER / "1" / RECORD).unlink()
    lines = []
    with Checkpoints(tmp_path, keep=2, report=lines.append) as checkpoints:
        assert checkpoints.steps() == [2, 3]
    assert [line.split("checkpoints/")[1] for line in lines] == ["1 was being deleted: the rest of it is gone now"]
    assert not list((tmp_path / FOLDER).glob("damaged-*"))


def test_an_old_checkpoint_with_a_flipped_bit_is_not_taken_for_that(tmp_path):
    _write(tmp_path)
    _damage(tmp_path / FOLDER / "1" / RECORD, "flipped", np.random.default_rng(0))
    lines = []
    with Checkpoints(tmp_path, keep=2, report=lines.append) as checkpoints:
        assert checkpoints.steps() == [2, 3]
    assert "DAMAGED CHECKPOINT" in lines[0] and (tmp_path / FOLDER / "damaged-1").is_dir()


def test_arrays_of_another_architecture_are_listed_and_nothing_is_moved(tmp_path):
    _write(tmp_path)
    like = _shapes()
    like["params"] |= {"b": like["params"]["a"]["w"], "new": like["params"]["b"]}
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(OtherArrays) as caught:
            checkpoints.load_latest(like)
        assert checkpoints.steps() == [1, 2, 3]
    assert "params/b: int32[1] in the checkpoint, float32[40,30] here" in str(caught.value)
    assert "params/new: absent in the checkpoint, int32[1] here" in str(caught.value)


def test_a_checkpoint_that_cannot_be_written_names_the_path_and_leaves_the_others(tmp_path, monkeypatch):
    _write(tmp_path, steps=(1, 2))
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(Checkpoints, "_seal", lambda self: _raise(OSError(28, "No space left on device")))
    checkpoints.save(3, _items(3), {})
    with pytest.raises(NotSaved, match=r"checkpoints/3 could not be written.*No space left.*steps 1, 2"):
        checkpoints.close()
    monkeypatch.undo()
    with Checkpoints(tmp_path) as checkpoints:
        assert _same(dict(checkpoints.load_latest(_shapes()).items), _items(2))
        checkpoints.save(3, _items(3), {})
    assert available_steps(tmp_path) == [2, 3]


def _raise(error):
    raise error


def test_changed_arrays_that_still_can_be_read_are_noticed(tmp_path, monkeypatch):
    """Another checkpoint's arrays under this one's record: where files are too large, only the arrays' checksum can tell."""
    _write(tmp_path)
    monkeypatch.setattr(checkpoint, "_check_files", lambda *_: None)
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
        for other in (split, NamedSharding(make_mesh(1, 2, 4), PartitionSpec("fsdp", "tensor"))):
            like = {"params": {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=other)}}
            found = checkpoints.load(1, like).items["params"]["w"]
            assert found.sharding == other
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
