import pytest

from train.log import Metrics, Speed, read_metrics


def _write(run, step, records):
    metrics = Metrics(run, step)
    for kind, number in records:
        metrics.write(kind, number, {"loss": float(number)})
    metrics.close()
    return metrics


def test_records_after_the_checkpoint_go_and_the_others_stay(tmp_path):
    _write(tmp_path, 0, [("train", 1), ("train", 2), ("valid", 2), ("train", 3), ("event", 3)])
    assert _write(tmp_path, 2, [("train", 3)]).forgotten == 1
    found = [(record["kind"], record["step"]) for record in read_metrics(tmp_path)]
    assert found == [("train", 1), ("train", 2), ("valid", 2), ("event", 3), ("train", 3)]


def test_a_line_torn_by_a_kill_is_left_out(tmp_path):
    _write(tmp_path, 0, [("train", 1), ("train", 2)])
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text()[:-9])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    _write(tmp_path, 1, [("train", 2)])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_a_malformed_line_is_named(tmp_path):
    _write(tmp_path, 0, [("train", 1), ("train", 2)])
    file = tmp_path / "metrics.jsonl"
    file.write_text("nonsense\n" + file.read_text())
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1"):
        read_metrics(tmp_path)


def test_the_other_processes_write_nothing(tmp_path):
    metrics = Metrics(tmp_path, 0, write=False)
    metrics.write("train", 1, {"loss": 1.0})
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_speed_counts_what_happened_since_the_start(monkeypatch):
    clock = iter([0.0, 10.0, 14.0, 14.0, 15.0, 15.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    speed = Speed()  # 0
    speed.start()  # 10
    for _ in range(8):
        speed.count(positions=50)
    rates = speed.read(batch_size=16, flops=10**6)  # 14
    assert rates == {
        "steps_per_second": 2.0,
        "examples_per_second": 32.0,
        "tokens_per_second": 100.0,
        "flops_per_second": 2e6,
    }
    assert speed.read(batch_size=16, flops=10**6) == {}
