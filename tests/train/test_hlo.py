"""Programs whose collectives and memory traffic can be counted by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from latentjax.sharding import make_mesh
from train.hlo import Collective, Program, array_bytes

FLOAT = 4  # bytes


@pytest.mark.parametrize(
    ("shape", "everywhere", "main_memory"),
    [
        ("f32[8,128]{1,0:T(8,128)}", 4096, 4096),
        ("bf16[3,5]", 30, 30),
        ("pred[7]{0}", 7, 7),
        ("f8e4m3fn[16]", 16, 16),
        ("s32[]", 4, 4),
        ("f32[8]{0:T(128)S(1)}", 32, 0),
        ("(f32[2]{0}, /*index=1*/(s8[3]{0}, u4[8]{0:S(2)}))", 15, 11),
        ("token[]", 0, 0),
    ],
)
def test_bytes_of_a_shape(shape, everywhere, main_memory):
    assert array_bytes(shape) == everywhere
    assert array_bytes(shape, main_memory=True) == main_memory


def _program(function, *shapes, specs=None, mesh=None) -> Program:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    if mesh is not None:
        function = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    return Program(jax.jit(function).lower(*arguments).compile().as_text())


@pytest.mark.parametrize(
    ("operation", "kind", "sent"),
    [
        (lambda x: jax.lax.psum(x, "data"), "all-reduce", 2 * 3 / 4),
        (lambda x: jax.lax.all_gather(x, "data").sum(axis=0), "all-gather", 3),
        (lambda x: jnp.tile(jax.lax.psum_scatter(x, "data", tiled=True), 4), "reduce-scatter", 3 / 4),
        (lambda x: jax.lax.all_to_all(x.reshape(4, -1), "data", 0, 0).reshape(-1), "all-to-all", 3 / 4),
        (lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)]), "collective-permute", 1),
    ],
    ids=["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"],
)
def test_collectives_count_as_often_as_their_loops_run(operation, kind, sent):
    mesh = make_mesh(data=4, fsdp=2, devices=jax.devices()[:8])
    size, outer, inner = 64, 5, 3

    def loops(x):
        def step(x, _):
            return jax.lax.scan(lambda x, _: (jnp.sin(operation(x)), None), x, length=inner)[0], None

        return jax.lax.scan(step, x, length=outer)[0]

    program = _program(loops, (size,), specs=PartitionSpec(), mesh=mesh)
    found = [c for c in program.collectives() if c.kind == kind]
    assert sum(c.count for c in found) == outer * inner
    assert {c.group for c in found} == {2 if kind == "collective-permute" else 4}
    assert sum(c.sent for c in found) == pytest.approx(outer * inner * sent * size * FLOAT)
    assert program.loops_of_unknown_length == 0


def test_collectives_of_one_device_are_none():
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    assert _program(lambda x: jax.lax.psum(x, "data"), (8,), specs=PartitionSpec(), mesh=mesh).collectives() == []


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['a'=8,'b'=2] {'a'}", 8),
        ("replica_groups=mesh['a'=8,'b'=2] {'a','b'}", 16),
        ("replica_groups=mesh['a'=8,'b'=2] {'a':(1)4}", 4),
    ],
)
def test_every_way_to_write_groups(groups, size):
    text = f"""
ENTRY %main (x: f32[10]) -> f32[10] {{
  %x = f32[10]{{0}} parameter(0)
  ROOT %r = f32[10]{{0}} all-reduce(%x), channel_id=1, {groups}, use_global_device_ids=true, to_apply=%add
}}
"""
    assert Program(text).collectives() == [Collective("all-reduce", 1, 40, size)]


def test_loops_without_a_written_trip_count():
    """TPU programs write none: the condition's constant counts."""
    text = """
%body (p: (s32[], f32[10])) -> (s32[], f32[10]) {
  %p = (s32[], f32[10]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[10]{0} get-tuple-element(%p), index=1
  %r = f32[10]{0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %t = (s32[], f32[10]{0}) tuple(%i, %r)
}

%condition (q: (s32[], f32[10])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %q = (s32[], f32[10]{0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %lt = pred[] compare(%j, %limit), direction=DIRECTION
}

ENTRY %main (a: (s32[], f32[10])) -> (s32[], f32[10]) {
  %a = (s32[], f32[10]{0}) parameter(0)
  ROOT %w = (s32[], f32[10]{0}) while(%a), condition=%condition, body=%body
}
"""
    counted = Program(text.replace("DIRECTION", "LT"))
    assert [c.count for c in counted.collectives()] == [12]
    unknown = Program(text.replace("DIRECTION", "GT"))
    assert [c.count for c in unknown.collectives()] == [1] and unknown.loops_of_unknown_length == 1


def test_traffic_of_one_operation():
    n = 10_000
    assert _program(lambda x: x + 1, (n,)).memory_traffic() == 2 * n * FLOAT
    assert _program(lambda a, b: a @ b, (30, 50), (50, 70)).memory_traffic() == FLOAT * (30 * 50 + 50 * 70 + 30 * 70)


def test_a_scan_reads_its_stacked_inputs_once():
    layers, width = 20, 64
    scanned = _program(lambda w, x: jax.lax.scan(lambda x, w: (w @ x, None), x, w)[0], (layers, width, width), (width,))
    once = layers * width * width * FLOAT
    assert (
        once <= scanned.memory_traffic() < 4 * once
    )  # a copy of each slice at most; all of them each time would be 20


def test_a_scan_writes_its_stacked_outputs_once():
    steps, n = 50, 1000

    def run(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x), x * 2), x, length=steps)[1]

    once = steps * n * FLOAT
    assert once <= _program(run, (n,)).memory_traffic() < 12 * once


def test_what_is_on_the_chip_is_free():
    text = """
ENTRY %main (x: f32[1000]) -> f32[1000] {
  %x = f32[1000]{0} parameter(0)
  %start = (f32[1000]{0:S(1)}, f32[1000]{0}, u32[]{:S(2)}) copy-start(%x)
  %near = f32[1000]{0:S(1)} copy-done(%start)
  %y = f32[1000]{0:S(1)} sine(%near)
  ROOT %z = f32[1000]{0} cosine(%y)
}
"""
    assert Program(text).memory_traffic() == 2 * 1000 * FLOAT


def test_what_is_no_program_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("HloModule nothing")


def test_gradients_of_data_parallel_training_are_reduced_once():
    mesh = make_mesh(data=8, devices=jax.devices()[:8])
    width, rows = 32, 16
    sharding = functools.partial(jax.sharding.NamedSharding, mesh)
    step = jax.jit(
        jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w))),
        in_shardings=(sharding(PartitionSpec()), sharding(PartitionSpec("data"))),
        out_shardings=sharding(PartitionSpec()),
    )
    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in ((width, width), (rows, width))]
    program = Program(step.lower(*shapes).compile().as_text())
    assert program.collectives() == [Collective("all-reduce", 1, width * width * FLOAT, 8)]
