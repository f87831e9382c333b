"""Fault drills: whatever ends a run, it goes on from its latest whole checkpoint and ends bit for bit as an unbroken one."""

import contextlib
import dataclasses
import os
import pathlib
import random
import shutil
import subprocess

import chex
import jax
import pytest

from latentjax.checkpoint import FOLDER, DamagedCheckpoint, OtherArrays, available_steps, load_item
from tests.close import assert_close
from tests.train import drill
from tests.train.drill import TOTAL, Fault, config, live, start
from train.config import Mesh
from train.disk import LOCK, RunUnavailable, hold
from train.log import TIMING, read_metrics
from train.loop import train
from train.run import check_run

ITEMS = ("params", "ema", "rest")  # rest: optimiser, step, key


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken") / "run"
    code, text = live(run)
    assert code == 0, text
    return run


def _facts(run):
    """All records, with the checksum of each step's batch; without what differs between two runs of one experiment."""
    return [{k: v for k, v in record.items() if k != TIMING} for record in read_metrics(run)]


def _count_whole(run):
    """The number of checkpoints that a run must still have, after reading and checking every array of them.

    A third one may be there, half of it deleted already: it was to go."""
    kept = available_steps(run)[-config().keep :]
    for step in kept:
        for item in ITEMS:
            load_item(run, item, step)
    return len(kept)


def _assert_ends_the_same(run, unbroken):
    assert _facts(run) == _facts(unbroken)
    assert [record["batch"] for record in read_metrics(run, "train")] != [0.0] * TOTAL
    for item in ITEMS:
        ours, theirs = load_item(run, item), load_item(unbroken, item)
        assert ours[1] == theirs[1] == TOTAL
        chex.assert_trees_all_equal(ours[0], theirs[0])


@dataclasses.dataclass
class Tally:
    """What a series of drills found."""

    faults: int = 0
    struck: int = 0  # the process was ended by the fault and not done before
    unfinished: int = 0  # a checkpoint was being written then
    whole: int = 0  # checkpoints found after the fault, all read and checked
    same: int = 0

    def add(self, fault, run, unbroken, code):
        """One drill: `run` continues after `fault`, which ended it with `code`, and is compared."""
        before = available_steps(run)
        self.faults, self.struck = self.faults + 1, self.struck + (code != 0)
        self.unfinished += any((run / FOLDER).glob("*.orbax-checkpoint-tmp*"))
        self.whole += _count_whole(run)
        ended, text = live(run)
        assert ended == 0 and "DAMAGED" not in text, text
        if before and before[-1] < TOTAL:
            assert f"continuing {run} at step {before[-1]} of" in text, (fault, text)
        _assert_ends_the_same(run, unbroken)
        self.same += 1


def _kill(folder, unbroken, rng, tally):
    fault = Fault.draw(rng)
    run = folder / f"{tally.faults}"
    code, text = live(run, fault)
    assert code in (0, -9), (fault, text)
    tally.add(fault, run, unbroken, code)


@pytest.mark.parametrize("seed", [5, 6, 7])
def test_a_run_killed_at_a_random_moment_ends_the_same(tmp_path, unbroken, seed):
    tally = Tally()
    _kill(tmp_path, unbroken, random.Random(seed), tally)
    assert tally.same == tally.faults == 1


@pytest.mark.slow
def test_twenty_random_kills(tmp_path, unbroken, capsys):
    tally, rng = Tally(), random.Random(0)
    for _ in range(20):
        _kill(tmp_path, unbroken, rng, tally)
    with capsys.disabled():
        print(f"\nkill -9: {tally}")
    assert tally.struck >= 15
    assert tally.unfinished >= 3
    assert tally.same == 20


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_the_same(tmp_path, unbroken, capsys):
    """One run, killed until it is done: damage would add up."""
    run, rng, kills = tmp_path / "run", random.Random(1), 0
    while max(available_steps(run), default=0) < TOTAL - 3 and kills < 12:
        step = max(available_steps(run), default=0) + rng.randrange(1, 4)
        code, text = live(run, Fault("save", step, rng.uniform(0, 0.1)))
        assert code == -9, text
        kills += 1
        _count_whole(run)
    with capsys.disabled():
        print(f"\none run, killed {kills} times")
    assert live(run)[0] == 0
    _assert_ends_the_same(run, unbroken)


@pytest.mark.slow
def test_five_terminations(tmp_path, unbroken, capsys):
    tally, rng = Tally(), random.Random(2)
    for number in range(5):
        run, fault = tmp_path / str(number), Fault("term", rng.randrange(1, TOTAL))
        code, text = live(run, fault)
        assert (code, available_steps(run)[-1]) == (drill.INTERRUPTED, fault.step), text
        tally.add(fault, run, unbroken, code)
    with capsys.disabled():
        print(f"\nSIGTERM: {tally}")


# Writing fails


def _disk_drill(run, unbroken, fault, free):
    code, text = live(run, fault)
    assert code == drill.UNSAVED, text
    assert f"error: checkpoint {run}" in text or f"error: {run}" in text, text
    assert f"--resume {run}" in text
    free()
    tally = Tally()
    tally.add(fault, run, unbroken, drill.UNSAVED)
    assert tally.whole > 0
    return text


def test_a_file_that_cannot_grow_ends_the_run_and_it_goes_on_later(tmp_path, unbroken):
    """The limit of file sizes stands for a full disk: it needs no rights."""
    text = _disk_drill(tmp_path / "run", unbroken, Fault("limit", step=7, size=3000), lambda: None)
    assert "could not be written" in text and "File too large" in text


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_it_goes_on_later(tmp_path, unbroken):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        text = _disk_drill(disk / "run", unbroken, Fault("fill", step=7), (disk / "filler").unlink)
        assert "No space left on device" in text
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("path", ["file/run", "/proc/run"])
def test_a_directory_that_cannot_be_written_is_found_before_compiling(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("file").write_text("")
    with pytest.raises((RunUnavailable, ValueError), match=f"--run {path}: "):
        train(config(), path, quiet=True)


# Two programs


def test_a_run_is_trained_by_one_program_at_a_time(tmp_path):
    run = tmp_path / "run"
    holder, _ = start(run, Fault("hang", step=3))
    while not (run.exists() and any((run / FOLDER).glob("[0-9]*"))):
        holder.join(0.05)
        assert holder.is_alive()
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(RunUnavailable, match=f"--run {run}: is being trained by process {holder.pid} on "):
        train(config(), run, quiet=True)
    assert sorted(path.name for path in run.iterdir()) == before
    holder.kill()
    holder.join()
    with hold(run):  # the dead hold nothing
        assert (run / LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_what_a_kill_in_the_first_moments_leaves_can_be_started_again(tmp_path):
    (tmp_path / LOCK).touch()
    (tmp_path / "config.json.partial").write_text("{")
    assert not check_run(tmp_path, config())
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not a run directory"):
        check_run(tmp_path, config())


# Checkpoints that are not as they were


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A run on one device that was stopped at step 7."""
    run = tmp_path_factory.mktemp("started") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.config.PACKAGES", ("latentjax.", "train.", "tests."))
        train(config(), run, quiet=True, stop_after_steps=7)
    return run


@pytest.fixture
def copied(started, tmp_path):
    return shutil.copytree(started, tmp_path / "run")


def test_a_run_without_its_checkpoints_starts_again(copied, unbroken, capsys):
    shutil.rmtree(copied / FOLDER)
    (copied / FOLDER).mkdir()
    train(config(), copied, progress=False)
    assert "records of steps after 0 go" in capsys.readouterr().out
    assert [record["step"] for record in read_metrics(copied, "train")] == list(range(1, TOTAL + 1))


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_again_by_itself(copied):
    for step in available_steps(copied):
        for file in (copied / FOLDER / str(step)).glob("record.json"):
            file.write_bytes(file.read_bytes()[:-20])
    for _ in range(2):
        with pytest.raises(DamagedCheckpoint, match="all checkpoints are damaged.*remove them"):
            train(config(), copied, quiet=True)


def test_a_checkpoint_of_another_architecture_is_named_and_kept(copied, monkeypatch):
    """The same config, but the code makes other arrays of it."""
    before = available_steps(copied)
    init = drill.Traced.init
    monkeypatch.setattr(drill.Traced, "init", lambda self, key: {"out": init(self, key)["out"].T})
    with pytest.raises(
        OtherArrays, match=r"params/method/out: float32\[8,14\] in the checkpoint, float32\[14,8\] here"
    ):
        train(config(), copied, quiet=True)
    assert available_steps(copied) == before
    assert not list((copied / FOLDER).glob("damaged-*"))


@pytest.fixture(scope="module")
def started_on_eight(tmp_path_factory):
    run = tmp_path_factory.mktemp("eight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.config.PACKAGES", ("latentjax.", "train.", "tests."))
        train(config(mesh=Mesh(data=8)), run, quiet=True, stop_after_steps=7)
    return run


MESHES = [("started_on_eight", Mesh(data=1)), ("started", Mesh(data=8)), ("started", Mesh(data=1, fsdp=4, tensor=2))]


@pytest.mark.parametrize(("old", "mesh"), MESHES)
def test_a_run_goes_on_on_another_mesh(tmp_path, request, unbroken, old, mesh, capsys):
    run = shutil.copytree(request.getfixturevalue(old), tmp_path / "run")
    result = train(config(mesh=mesh), run, progress=False)
    text = capsys.readouterr().out
    assert f"continuing {run} at step 7 of {TOTAL}" in text and "the run began on another mesh" in text
    assert result.finished
    assert len(result.params["backbone"]["embed"]["tokens"].devices()) == mesh.data * mesh.fsdp * mesh.tensor
    assert_close(jax.device_get(load_item(run, "params")[0]), load_item(unbroken, "params")[0], 1e-4)
    ours, theirs = ([record["loss"] for record in read_metrics(r, "train")] for r in (run, unbroken))
    assert_close(ours, theirs, 1e-4)


def test_another_method_starts_from_the_backbone_only(started):
    """Bigram has an array of the same name and shape; it means something else there."""
    from tests.train.small import experiment
    from train.prepare import prepare

    first = prepare(experiment(init_from=f"{started}@6")).first_state().params
    new = prepare(experiment()).first_state().params
    theirs, _ = load_item(started, "ema", 6)
    chex.assert_trees_all_equal(first["backbone"], theirs["backbone"])
    chex.assert_trees_all_equal(first["method"], new["method"])
    with contextlib.suppress(AssertionError):
        chex.assert_trees_all_equal(first["backbone"], new["backbone"])
        pytest.fail("the backbone is the new one")
