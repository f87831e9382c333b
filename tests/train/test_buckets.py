"""Runs that keep their checkpoints in a bucket."""

import chex
import pytest

from latentjax.checkpoint import ADDRESS, FOLDER, available_steps, load_item
from tests.bucket import bucket  # noqa: F401  # a fixture
from tests.train.small import experiment
from train.log import TIMING, read_metrics
from train.loop import train
from train.run import check_run, load_run


def _facts(run):
    return [
        {k: v for k, v in record.items() if k != TIMING} for record in read_metrics(run) if record["kind"] != "event"
    ]


def test_a_run_in_pieces_ends_as_one_on_disk(tmp_path, bucket):  # noqa: F811
    unbroken = train(experiment(), tmp_path / "local", quiet=True)
    run = tmp_path / "run"
    first = train(experiment(), run, checkpoints=f"{bucket}/", quiet=True, stop_after_steps=3)
    assert (first.step, available_steps(run)[-1]) == (3, 3)
    last = train(experiment(), run, quiet=True)
    assert last.finished and last.compiles == 1
    assert _facts(run) == _facts(unbroken.run)
    for item in ("params", "rest"):
        ours, theirs = load_item(run, item), load_item(unbroken.run, item)
        assert ours[1] == theirs[1] == last.step
        chex.assert_trees_all_equal(ours[0], theirs[0])
    assert load_run(run).step == last.step
    assert (run / ADDRESS).read_text() == f"{bucket}\n" and not (run / FOLDER).exists()
    assert str(last.step) in {path.name for path in bucket.iterdir()}


def test_where_checkpoints_cannot_be(tmp_path, bucket):  # noqa: F811
    for wrong in ("bucket/run", "gs://bucket", "gs://bucket/", "s3://bucket/run", str(tmp_path)):
        with pytest.raises(ValueError, match=f"--checkpoints {wrong}: must be gs://BUCKET/FOLDER"):
            check_run(tmp_path / "run", experiment(), wrong)
    train(experiment(), tmp_path / "run", checkpoints=str(bucket), quiet=True, stop_after_steps=1)
    with pytest.raises(ValueError, match=rf"--checkpoints {bucket}: holds those of another run \(steps 1\)"):
        check_run(tmp_path / "other", experiment(), str(bucket))
    with pytest.raises(ValueError, match=f"those of the run .* are in {bucket}; leave it out"):
        check_run(tmp_path / "run", experiment(), f"{bucket}-2")
    assert check_run(tmp_path / "run", experiment(), str(bucket))
    assert not (tmp_path / "other").exists()


def test_a_run_on_disk_does_not_move_to_a_bucket(tmp_path, bucket):  # noqa: F811
    train(experiment(), tmp_path / "run", quiet=True, stop_after_steps=1)
    with pytest.raises(ValueError, match="are in .*/run/checkpoints; leave it out"):
        check_run(tmp_path / "run", experiment(), str(bucket))


def test_without_a_client_of_the_service_the_error_names_it(tmp_path, monkeypatch):
    def missing(*arguments, **options):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("fsspec.filesystem", missing)
    from etils.epath import backend

    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    with pytest.raises(ValueError, match=r"needs gcsfs: pip install -e '\.\[gcs\]'"):
        check_run(tmp_path / "run", experiment(), "gs://bucket/run")
