"""Tasks as tensorflow-datasets: what is written comes back equal, without TensorFlow."""

import subprocess
import sys

import numpy as np
import pytest

from latentjax.tasks.affine_chain import AffineChain
from latentjax.tasks.modular_arithmetic import ModularArithmetic

pytest.importorskip("tensorflow_datasets", reason="needs the train extra (tensorflow-datasets)")

from latentjax.tasks.builders import TaskBuilder, dump_meta, load_meta, open_split

READ = """
import sys
from latentjax.tasks.builders import TaskBuilder, open_split
{make}
builder = TaskBuilder(task, counts={{"train": 50, "test": 7}}, seed=3, data_dir=sys.argv[1])
if {write}:
    builder.download_and_prepare()
for split, count in builder.counts.items():
    read = open_split(builder, split)
    made = task.examples(split, count=count, seed=3)
    assert len(read) == len(made) == count
    for a, b in zip(read, made):
        assert (a.question, a.steps, a.answer) == (b.question, b.steps, b.answer), (a, b)
        assert repr(a.meta) == repr(dict(b.meta)), (a.meta, b.meta)
    assert read[-1].question == read[count - 1].question and len(read[2:5]) == 3
assert "tensorflow" not in sys.modules
print("equal")
"""
GRAPH = "from latentjax.tasks.graph_prosqa import GraphProsQA; task = GraphProsQA()"
CHAIN = "from latentjax.tasks.affine_chain import AffineChain; task = AffineChain()"


@pytest.mark.parametrize("make", [GRAPH, CHAIN], ids=["GraphProsQA", "AffineChain"])
def test_written_examples_come_back_without_tensorflow(make, tmp_path, repository, request):
    if make is GRAPH:
        request.getfixturevalue("published")
    for write in (True, False):  # the second process only reads
        done = subprocess.run(
            [sys.executable, "-c", READ.format(make=make, write=write), str(tmp_path)],
            capture_output=True, text=True, cwd=repository,
        )  # fmt: skip
        assert done.stdout.strip().endswith("equal"), done.stderr


def test_different_data_have_different_folders(tmp_path):
    def folder(task, counts, seed):
        return TaskBuilder(task, counts=counts, seed=seed, data_dir=tmp_path).data_dir

    folders = {
        folder(AffineChain(), {"train": 5}, 0),
        folder(AffineChain(), {"train": 6}, 0),
        folder(AffineChain(), {"train": 5}, 1),
        folder(AffineChain(modulus=11), {"train": 5}, 0),
        folder(ModularArithmetic(), {"train": 5}, 0),
    }
    assert len(folders) == 5


def test_unknown_splits(tmp_path):
    with pytest.raises(ValueError, match="split 'dev': AffineChain has train, valid, test"):
        TaskBuilder(AffineChain(), counts={"dev": 5}, data_dir=tmp_path)
    with pytest.raises(ValueError, match="at least one split"):
        TaskBuilder(AffineChain(), counts={}, data_dir=tmp_path)
    builder = TaskBuilder(AffineChain(), counts={"train": 5}, data_dir=tmp_path)
    with pytest.raises(ValueError, match="split='test': the builder holds train"):
        open_split(builder, "test")


def test_meta_round_trip():
    meta = {
        "edges": np.array([[1, 2], [3, 4]], np.int32), "empty": np.zeros((0, 2), np.int32), "names": ("a", "b"),
        "layers": ((1,), (2, 3), ()), "root": 3, "rate": 0.1, "flag": True, "none": None, "inner": {"x": (1, "y")},
    }  # fmt: skip
    back = load_meta(dump_meta(meta))
    assert back.keys() == meta.keys()
    for key, value in meta.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(back[key], value)
            assert (back[key].dtype, back[key].shape) == (value.dtype, value.shape)
        else:
            assert back[key] == value
            assert type(back[key]) is type(value)
    with pytest.raises(TypeError, match="no JSON form"):
        dump_meta({"bad": {1, 2}})
