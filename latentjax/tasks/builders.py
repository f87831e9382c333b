"""Tasks as `tensorflow-datasets` builders in ArrayRecord files, which are read without TensorFlow.

`TaskBuilder(task, counts=...).download_and_prepare()` writes the splits once; `open_split` reads one as random-access
`Example`s. Text fields are stored as text, `meta` as a JSON string.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, overload

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from latentjax.tasks.base import Example, Task

_ARRAY = "ndarray"  # key that marks a numpy array in the JSON of `meta`


class TaskBuilder(tfds.core.GeneratorBasedBuilder):
    """Builder of the splits `counts` of one task: name of split -> number of examples (None: all of a published split).

    The folder is named after the task, its fields, the counts and the seed, so that different data never share one. A
    record has `question`, `answer` (text), `steps` (texts) and `meta` (JSON text)."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}

    def __init__(
        self,
        task: Task,
        *,
        counts: Mapping[str, int | None],
        seed: int = 0,
        data_dir: str | os.PathLike | None = None,
    ):
        if not counts:
            raise ValueError("counts={}: name at least one split")
        for split in counts:
            if split not in task.splits:
                raise ValueError(f"counts has the split {split!r}: {type(task).__name__} has {', '.join(task.splits)}")
        self.task, self.counts, self.seed = task, dict(counts), seed
        described = json.dumps([dataclasses.asdict(task), self.counts, seed], sort_keys=True)
        digest = hashlib.sha256(described.encode()).hexdigest()[:12]
        config = tfds.core.BuilderConfig(name=f"{task.name}-{digest}", description=f"{task!r}, {counts}, seed {seed}")
        super().__init__(data_dir=data_dir, config=config, file_format="array_record")

    @tfds.core.utils.classproperty
    @classmethod
    def code_path(cls) -> epath.Path:
        # The inherited property imports importlib_resources, which tensorflow-datasets 4.9.10 does not declare.
        return epath.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({
            "question": tfds.features.Text(),
            "steps": tfds.features.Sequence(tfds.features.Text()),
            "answer": tfds.features.Text(),
            "meta": tfds.features.Text(),
        })  # fmt: skip
        # Without shuffling a record's index is the example's: the first n of a split are the first n of the task.
        return tfds.core.DatasetInfo(
            builder=self, features=features, description=type(self.task).__doc__ or "", disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # the tasks find or make their data themselves
        return {split: self._generate_examples(split) for split in self.counts}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, example in enumerate(self.task.examples(split, count=self.counts[split], seed=self.seed)):
            yield (
                key,
                {
                    "question": example.question,
                    "steps": list(example.steps),
                    "answer": example.answer,
                    "meta": dump_meta(example.meta),
                },
            )


def open_split(builder: TaskBuilder, split: str) -> Sequence[Example]:
    """The examples of a prepared split, read on access. Raises ValueError if the builder does not hold `split`."""
    if split not in builder.counts:
        raise ValueError(f"split={split!r}: the builder holds {', '.join(builder.counts)}")
    return _Examples(builder.as_data_source(split=split))


class _Examples(Sequence[Example]):
    """A data source whose records (text as bytes) come back as examples."""

    def __init__(self, source: Sequence[Mapping[str, Any]]):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        record = self._source[index % len(self)]
        return Example(
            record["question"].decode(),
            tuple(step.decode() for step in record["steps"]),
            record["answer"].decode(),
            load_meta(record["meta"].decode()),
        )


def dump_meta(meta: Mapping[str, Any]) -> str:
    """`meta` as JSON: strings, numbers, booleans, None, tuples, string-keyed mappings and integer arrays."""

    def encode(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return {_ARRAY: value.tolist(), "dtype": str(value.dtype), "shape": value.shape}
        raise TypeError(f"meta holds {value!r} of type {type(value).__name__}, which has no JSON form")

    return json.dumps(dict(meta), default=encode)


def load_meta(text: str) -> dict[str, Any]:
    """The inverse of `dump_meta`; sequences come back as tuples."""

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(map(decode, value))
        if isinstance(value, dict):
            if _ARRAY in value:
                return np.array(value[_ARRAY], value["dtype"]).reshape(value["shape"])
            return {key: decode(item) for key, item in value.items()}
        return value

    return decode(json.loads(text))
