import dataclasses
import importlib.util
import os
import re

import jax
import pytest

from latentjax.backbone.config import BackboneConfig, tiny
from latentjax.methods import Coconut, CoT, LaDiR, Lengths, ThoughtVAE
from latentjax.methods.superposition import GraphCoconut
from latentjax.tasks.successor_list import SuccessorList
from tests.methods.battery import CASES
from train import chips, cli
from train.config import Experiment, Mesh
from train.flops import matmul_flops
from train.forecast import _retargeted, forecast, report
from train.prepare import prepare
from train.step import make_step

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ,
    reason="needs the TPU compiler: the package libtpu, extra `tpu`, or its path in TPU_LIBRARY_PATH",
)
VERDICT = re.compile(r"fits: (yes|no) \(\d+\.\d\d GiB / \d+\.\d\d GiB per device\)")


def _coconut(**changes) -> Experiment:
    backbone = tiny(16, width=16, layers=2, heads=2, max_positions=40)
    backbone = dataclasses.replace(backbone, **changes.pop("backbone", {}))
    method = Coconut(backbone, Lengths(11, 10), max_latent_stage=2, epochs_per_stage=1, num_epochs=3, markers="none")
    settings = {"name": "planned", "task": SuccessorList(), "method": method, "batch_size": 16} | changes
    return Experiment(**settings)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_shapes_of_a_batch_are_those_of_encode(case):
    for stage in {stage.index for stage in case.method.stages()}:
        made = case.batch(stage=stage)
        planned = case.method.batch_shapes(len(made.question), stage)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(lambda x: (x.shape, x.dtype), planned)


def test_memory_is_that_of_the_shards():
    plan = forecast(_coconut(mesh=Mesh(fsdp=2, tensor=2), ema=0.9), "cpu-8")
    split = 2 * 2 * 16 * 64 + 2 * 4 * 16 * 16 + 16 * 16  # kernels of MLP and attention, embedding: over fsdp and tensor
    positions = 40 * 16  # over fsdp
    whole = (2 * 2 + 1) * 2 * 16  # norms
    parameters = 4 * (split // 4 + positions // 2 + whole)
    assert plan.memory["parameters"] == plan.memory["moving average"] == parameters
    assert 0 < plan.memory["optimiser"] - 2 * parameters <= 2 * 4  # the step counts of Adam and of the schedule
    rows, thoughts = 16 // 4, 2
    assert plan.memory["batch"] == rows * ((4 + 1) * 11 + thoughts + (4 + 1 + 1) * 10)
    assert plan.used == sum(plan.memory.values()) and min(plan.memory.values()) >= 0
    assert plan.fits and plan.mesh == {"data": 2, "fsdp": 2, "tensor": 2}


def test_work_is_that_of_the_real_step():
    config = _coconut(train_examples=32, valid_examples=4)
    prepared = prepare(config)
    real = jax.make_jaxpr(make_step(config, 4))(prepared.shapes, prepared.training.batch(3))
    plan = forecast(_coconut(backbone={"remat": "full"}), "cpu-8")
    assert plan.model_flops == matmul_flops(real) < plan.flops


def test_data_parallel_training_sends_its_gradients():
    """At least once around a ring; at most once for each use of the parameters: question, thoughts, text."""
    plan = forecast(_coconut(), "cpu-8")
    assert set(plan.collectives) == {"all-reduce"} and plan.loops_of_unknown_length == 0
    times, sent = plan.collectives["all-reduce"]
    once = 2 * 7 / 8 * plan.memory["parameters"]
    assert once <= sent < (2 + 2) * once + 1000 and times > 0
    alone = forecast(_coconut(mesh=Mesh(data=1), batch_size=2), "cpu-1")
    assert alone.collectives == {} and alone.traffic > 0


def test_activations_are_split_by_rows():
    """Without `split_rows` the partitioner splits their width over fsdp, and sums each product over all devices: more than
    one activation of the MLP for the whole batch (2.3 of them here; with it 0.3, for parameters and their gradients)."""
    wide = {"width": 64, "heads": 4, "mlp_width": 512}
    plan = forecast(_coconut(mesh=Mesh(fsdp=8), backbone=wide, batch_size=512), "cpu-8")
    positions, bytes_each = 11 + 9, 4
    assert sum(sent for _, sent in plan.collectives.values()) < bytes_each * 512 * positions * 512


def test_the_stage_with_most_thoughts_is_planned():
    method = dataclasses.replace(_coconut().method, pad_slots=False)
    plan = forecast(_coconut(method=method), "cpu-1")
    assert plan.positions == (11, 2, 10) and plan.stage.index == 2


def test_a_batch_with_more_arrays_is_planned():
    backbone = BackboneConfig(vocab_size=16, max_positions=40, width=16, layers=1, heads=2)
    method = GraphCoconut(backbone, Lengths(8, 2), loss_on="set", stage_steps=(1, 1, 1, 1, 1))
    rows = 8 // 8
    assert forecast(_coconut(method=method, batch_size=8), "cpu-8").memory["batch"] == rows * (5 * 8 + 4 + 6 * 2 + 16)


def test_report_of_emulated_devices():
    lines = report(forecast(_coconut(), "cpu-8"))
    assert VERDICT.fullmatch(lines[-1])[1] == "yes"
    text = "\n".join(lines)
    assert "8 CPU devices" in text and "11 + 2 + 10 positions" in text and "utilisation: not bounded" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-257", "no such topology; perhaps you meant v5e-256.*a name counts chips: v5e-1, .*cpu-N"),
        ("h100-8", "no such topology.*v5p-64"),
        ("cpu-0", "no such topology"),
        ("cpu-1000", "cpu-1000: JAX has started with 8 CPU devices.*XLA_FLAGS"),
    ],
)
def test_unknown_devices(name, message):
    with pytest.raises(ValueError, match=message):
        forecast(_coconut(), name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": Mesh(data=3)}, "needs 3 devices, but there are 8"),
        ({"batch_size": 12}, "batch_size=12 is not a multiple of data x fsdp = 8"),
        ({"batch_size": 16, "accumulate": 4}, "batch_size=4 is not a multiple"),
        ({"mesh": Mesh(tensor=4)}, "mesh.tensor=4: does not divide method.backbone.heads=2"),
        ({"backbone": {"max_positions": 22}}, "need 23 positions, but backbone.max_positions=22"),
    ],
)
def test_what_cannot_run_is_not_compiled(changes, message):
    with pytest.raises(ValueError, match=message):
        forecast(_coconut(**changes), "cpu-8")


def test_every_topology_has_a_name_that_counts_its_chips():
    known = chips.topologies()
    assert {"v5e-8", "v5e-64", "v5e-256", "v5p-64", "v6e-256"} <= set(known)
    assert known["v5p-64"] == ("v5p", "4x4x4") and known["v5e-8"] == ("v5e", "2x4")


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e-8", "v5p-1", "v6e-4"])
def test_every_generation_is_described(name):
    where = chips.target(name)
    assert len(where.devices) == int(name.split("-")[1]) and {d.platform for d in where.devices} == {"tpu"}


@needs_libtpu
def test_plan_of_a_tpu():
    plan = forecast(_coconut(mesh=Mesh(fsdp=2), backbone={"dtype": "bfloat16"}), "v5p-4")
    lines = report(plan)
    assert VERDICT.fullmatch(lines[-1])[1] == "yes" and plan.fits
    text = "\n".join(lines)
    assert "4 chips" in text and "The name counts CHIPS: public names such as v5p-8 count cores" in text
    assert "layers scanned" in text and "at most" in text
    assert plan.target.platform == "tpu" and plan.loops_of_unknown_length == 0
    assert plan.collectives["all-reduce"][1] > 0 and 0 < plan.utilisation < 1
    longest = max(plan.seconds().values())
    assert plan.utilisation == pytest.approx(plan.model_flops / 4 / 459e12 / longest)


@needs_libtpu
def test_plan_that_does_not_fit():
    backbone = {"width": 4096, "heads": 32, "layers": 48, "vocab_size": 128}
    plan = forecast(_coconut(backbone=backbone, batch_size=4), "v5e-4")
    lines = report(plan)
    assert not plan.fits and VERDICT.fullmatch(lines[-1])[1] == "no"
    assert plan.memory["optimiser"] > 2 * 12 * 4096**2 * 48 * 4


def test_defaults_follow_the_platform_that_is_compiled_for():
    here = tiny(16)
    assert not here.scans_layers
    assert dataclasses.replace(here, platform="tpu").scans_layers
    assert not dataclasses.replace(here, platform="tpu", scan_layers=False).scans_layers


def test_every_backbone_of_a_method_is_compiled_for_the_target():
    vae = ThoughtVAE(
        tiny(16), Lengths(4, 4), steps=1, latents=1, latent_width=4, max_blocks=2, encoder=tiny(16, layers=1)
    )
    method = LaDiR(tiny(16), Lengths(4, 4), vae=vae, steps=1)
    experiment = Experiment("plan", SuccessorList(), method, init_from={"vae": "elsewhere"})
    moved = _retargeted(experiment, platform="tpu").method
    backbones = (moved.backbone, moved.vae.backbone, moved.vae.encoder)
    assert [each.platform for each in backbones] == ["tpu"] * 3
    assert [each.layers for each in backbones] == [2, 2, 1]


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(
        "from latentjax.backbone.config import tiny\nfrom latentjax.methods import CoT, Lengths\n"
        "from latentjax.tasks.gsm8k import GSM8K\nfrom train.config import Experiment, Pretrained\n"
        "config = Experiment('small', GSM8K(), CoT(tiny(16), Lengths(8, 8), epochs=1), batch_size=8,\n"
        "    pretrained=Pretrained('no/such/folder'))\n"
    )
    assert cli.main(["small.py", "--plan", "cpu-4", "--mesh.fsdp", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert VERDICT.fullmatch(printed[-1]) and any("'data': 2, 'fsdp': 2" in line for line in printed)
    assert cli.main(["small.py", "--plan", "v5e-12"]) == cli.BAD_INPUT
    assert "no such topology" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["small.py"]  # neither weights nor data, and no run


def test_methods_without_thoughts_are_planned():
    plan = forecast(_coconut(method=CoT(tiny(16), Lengths(8, 8), epochs=1)), "cpu-1")
    assert plan.positions == (8, 0, 8) and plan.traffic > 0
