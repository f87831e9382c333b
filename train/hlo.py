"""What a compiled program does, read from its optimised HLO text: collectives and memory traffic, loops multiplied out.

XLA's own cost analysis counts the body of a loop once, however often it runs; layers, thoughts and microbatches are
loops here. So every computation has a number of calls: the entry 1, the body of a loop its trip count times the calls of
the computation that holds the loop. A trip count is `known_trip_count` where the compiler wrote it down, else the
constant that the loop's condition compares its counter with (JAX's scans count from 0 in steps of 1). Operations are
those of openxla.org/xla/operation_semantics; the text is what XLA's `HloModule::ToString` writes.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.-]+) = (.*)")
_NAME = re.compile(r"%([\w.-]+)")
# These move nothing: they rename values or take a number from a register; what `while`, `call` and the like run counts there.
_FREE = frozenset(
    """
    parameter constant iota tuple get-tuple-element bitcast while conditional call async-start async-update async-done
    after-all add-dependency opt-barrier domain partition-id replica-id
    """.split()  # noqa: SIM905
)
_FREE_CALLS = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast|AssumeGatherIndicesInBound)"')
_SLICING = frozenset(("dynamic-slice", "slice", "gather"))


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of the program, as often as one step runs it."""

    kind: str  # one of COLLECTIVES
    count: int  # times a step runs it
    size: int  # bytes of its operands on one device
    group: int  # devices that take part together

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step, under the algorithms that send least (Chan et al. 2007, doi
        10.1002/cpe.1206): among n devices (n-1)/n of the operand for reduce-scatter and all-to-all, n-1 operands for
        all-gather, 2(n-1)/n operands for all-reduce, and one for collective-permute."""
        n = self.group
        operands = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1.0, "collective-permute": 1.0}
        return self.count * self.size * operands.get(self.kind, (n - 1) / n)


def array_bytes(shape: str, *, main_memory: bool = False) -> int:
    """Bytes of all arrays in `shape`, such as `f32[8,128]{1,0:T(8,128)}`, without the padding of its layout.

    `main_memory` leaves out arrays that the compiler placed on the chip: their layout has S(1) or another memory space."""
    total = 0
    for kind, sizes, layout in _ARRAY.findall(shape):
        if main_memory and re.search(r"S\([1-9]", layout):
            continue
        bits = 8 if kind == "pred" else int((re.findall(r"\d+", kind) or [0])[0])
        total += math.prod(map(int, filter(None, sizes.split(",")))) * bits // 8
    return total


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]  # names; of a parameter or constant what stands in its place
    attributes: str

    def attribute(self, key: str) -> str:
        found = re.search(rf"\b{key}=%([\w.-]+)", self.attributes)
        if found is None:
            raise ValueError(f"compiled text: {self.opcode} {self.name} has no {key}")
        return found[1]


class _Computation(dict[str, _Instruction]):
    """Instructions by name, in the order of the text."""

    root: _Instruction

    def operand_shapes(self, instruction: _Instruction) -> list[str]:
        return [self[name].shape for name in instruction.operands if name in self]

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        return {int(i.operands[0]): i.name for i in self.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[_Instruction]]:
        users: dict[str, list[_Instruction]] = {}
        for instruction in self.values():
            for name in dict.fromkeys(instruction.operands):
                users.setdefault(name, []).append(instruction)
        return users


class Program:
    """The computations of a compiled program and how often one step calls each."""

    def __init__(self, text: str):
        """`text`: what `jax.stages.Compiled.as_text()` returns. Raises ValueError if it is no HLO module."""
        self._computations, entry = _parse(text)
        self.loops_of_unknown_length = 0  # their bodies count once
        self._calls: dict[str, int] = {}
        self._count(entry, 1)

    def _count(self, name: str, calls: int) -> None:
        self._calls[name] = self._calls.get(name, 0) + calls
        for instruction in self._computations[name].values():
            times = self._trip_count(instruction) if instruction.opcode == "while" else 1
            for callee in _callees(instruction):
                self._count(callee, calls * times)

    def _trip_count(self, loop: _Instruction) -> int:
        known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self._computations[loop.attribute("condition")]
        inputs = [condition[name] for name in condition.root.operands if name in condition]
        limits = [int(i.operands[0]) for i in inputs if i.opcode == "constant" and i.shape.startswith("s32[]")]
        if len(limits) == 1 and "direction=LT" in condition.root.attributes:
            return limits[0]
        self.loops_of_unknown_length += 1
        return 1

    def _executed(self) -> Iterator[tuple[_Computation, _Instruction, int]]:
        for name, calls in self._calls.items():
            for instruction in self._computations[name].values():
                yield self._computations[name], instruction, calls

    # Collectives

    def collectives(self) -> list[Collective]:
        """All collectives among at least two devices, those inside fusions included."""
        found = []
        for computation, instruction, calls in self._executed():
            for scope, each in self._with_fused(computation, instruction):
                kind = each.opcode.removesuffix("-start")
                group = _group_size(each.attributes) if kind in COLLECTIVES else 1
                if group > 1:
                    # TPU programs write a reduce-scatter as a fusion of an all-reduce and the slice that is kept.
                    if kind == "all-reduce" and scope is not computation and scope.root.opcode == "dynamic-slice":
                        kind = "reduce-scatter"
                    size = sum(array_bytes(shape) for shape in scope.operand_shapes(each))
                    found.append(Collective(kind, calls, size, group))
        return found

    def _with_fused(
        self, computation: _Computation, instruction: _Instruction
    ) -> Iterator[tuple[_Computation, _Instruction]]:
        yield computation, instruction
        if instruction.opcode == "fusion":
            fused = self._computations[instruction.attribute("calls")]
            for inner in fused.values():
                yield from self._with_fused(fused, inner)

    # Memory traffic

    def memory_traffic(self) -> int:
        """Bytes that one step reads from and writes to a device's main memory (HBM).

        An instruction reads its operands and writes its result. Where a fusion reads only slices, or updates in place,
        the slice counts; what the compiler placed in on-chip memory is free, and so is the padding of a layout."""
        return sum(calls * self._traffic(computation, i) for computation, i, calls in self._executed())

    def _traffic(self, scope: _Computation, instruction: _Instruction) -> int:
        opcode, operands = instruction.opcode, scope.operand_shapes(instruction)
        if opcode in _FREE or opcode.endswith("-start") or _FREE_CALLS.search(instruction.attributes):
            return 0
        written = array_bytes(instruction.shape, main_memory=True)
        if opcode == "fusion":
            return self._fusion_traffic(instruction, operands)
        if opcode.endswith("-done"):  # as much is read as is written, wherever it goes
            sources = scope.operand_shapes(scope[instruction.operands[0]])
            reads = array_bytes(instruction.shape) if array_bytes("".join(sources), main_memory=True) else 0
            return min(reads, array_bytes("".join(sources))) + written
        if opcode in _SLICING:
            return (array_bytes(instruction.shape) if array_bytes(operands[0], main_memory=True) else 0) + written
        if opcode == "dynamic-update-slice":
            return (array_bytes(operands[1]) if written else 0) + array_bytes(operands[1], main_memory=True)
        return sum(array_bytes(shape, main_memory=True) for shape in operands) + written

    def _fusion_traffic(self, fusion: _Instruction, operands: list[str]) -> int:
        fused = self._computations[fusion.attribute("calls")]
        total = sum(
            self._read(fused, fused.parameters[number])
            for number, shape in enumerate(operands)
            if array_bytes(shape, main_memory=True)
        )
        roots = [fused.root]
        if fused.root.opcode == "tuple":
            roots = [fused[name] for name in fused.root.operands]
        results = [match[0] for match in _ARRAY.finditer(fusion.shape)]
        return total + sum(
            self._written(fused, root)
            for root, result in zip(roots, results, strict=False)
            if array_bytes(result, main_memory=True)
        )

    def _read(self, scope: _Computation, name: str) -> int:
        """Bytes of the value `name` that the fusion `scope` reads: all, or its slices where nothing else uses it."""
        whole, part = array_bytes(scope[name].shape), 0
        for user in scope.users.get(name, ()):
            first = user.operands[0] == name
            if user.opcode in _SLICING and first:
                part += array_bytes(user.shape)
            elif user.opcode == "bitcast":
                part += self._read(scope, user.name)
            elif user.opcode == "fusion":
                inner = self._computations[user.attribute("calls")]
                numbers = [number for number, operand in enumerate(user.operands) if operand == name]
                part += sum(self._read(inner, inner.parameters[number]) for number in numbers)
            elif user.opcode != "dynamic-update-slice" or not first:
                return whole
        return min(whole, part)

    def _written(self, scope: _Computation, root: _Instruction) -> int:
        """Bytes that a fusion writes for its result `root`: all, or the part that it updates in place."""
        while root.opcode == "bitcast":
            root = scope[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            return array_bytes(scope[root.operands[1]].shape)
        if root.opcode == "fusion":
            inner = self._computations[root.attribute("calls")]
            return self._written(inner, inner.root)
        return array_bytes(root.shape)


# Reading the text


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """Computations by name, and the name of the entry."""
    computations: dict[str, _Computation] = {}
    current, entry = None, None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")) and (header := _NAME.search(line)):
            current = computations.setdefault(header[1], _Computation())
            entry = header[1] if line.startswith("ENTRY ") else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            instruction = _instruction(match[2], match[3])
            current[instruction.name] = instruction
            if match[1]:
                current.root = instruction
    if entry is None:
        raise ValueError("HLO text has no ENTRY computation")
    return computations, entry


def _instruction(name: str, rest: str) -> _Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode = rest[: rest.index("(")]
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : close - 1]
    operands = tuple(_NAME.findall(inside)) or ((inside,) if inside else ())
    return _Instruction(name, shape, opcode, operands, rest[close:])


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"HLO text has unbalanced parentheses: {text[:80]!r}")


def _callees(instruction: _Instruction) -> Iterable[str]:
    """Computations that run when `instruction` does. A fusion is read as a whole, a reducer is part of its operation."""
    match instruction.opcode:
        case "while":
            return instruction.attribute("body"), instruction.attribute("condition")
        case "call":
            return (instruction.attribute("to_apply"),)
        case "async-start":
            return (instruction.attribute("calls"),)
        case "conditional":
            listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            named = re.findall(r"(?:true|false)_computation=%([\w.-]+)", instruction.attributes)
            return [*(_NAME.findall(listed[1]) if listed else ()), *named]
    return ()


def _group_size(attributes: str) -> int:
    """Devices of one group: `replica_groups` as a list, as [groups,size]<=[...], or as axes of a mesh."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return 2 if "source_target_pairs" in attributes else 1
