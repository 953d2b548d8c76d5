"""The bench on a CUDA device: every row is measured, whatever its figures are."""

import math

import absld.bench.bench
import absld.engine.techniques
from absld.bench import peak_throughput, trials
from absld.bench.bench import Bench
from absld.bench.contenders import BenchConfig


def test_every_row_that_is_not_left_out_is_measured_on_the_device(cuda, monkeypatch):
    """A pretend device has neither bfloat16 nor a compiler here. No technique is kept, so that each
    is tried with the CUDA graph of the automatic engine."""
    monkeypatch.setitem(peak_throughput.MATRIX_SIZE, "cuda", 64)
    monkeypatch.setattr(peak_throughput, "MIN_SECONDS", 0.0001)
    monkeypatch.setattr(absld.bench.bench, "MAX_SLOWDOWN", math.inf)
    monkeypatch.setattr(absld.bench.bench, "MIN_GAIN", math.inf)
    if cuda.is_pretend:
        for module in (trials, absld.engine.techniques):
            monkeypatch.setattr(module, "computes_bf16", lambda device: False)
            monkeypatch.setattr(module, "can_compile", lambda device: False)
    config = BenchConfig(
        student="convnet",
        teacher_model="convnet",
        batch_size=16,
        image_size=8,
        images=32,
        rounds=1,
        device=cuda.device,
    )
    bench = Bench(config)
    rows = {row["name"]: row for row in bench.rows()}
    left_out = {name for name, row in rows.items() if row["note"]}
    assert left_out == {"+ --channels-last"} | {
        trial.name for trial in trials.trials(bench.device) if trial.missing
    }
    file, auto, plain = (rows[n] for n in ("absld_min.py", "--engine auto", "--engine plain"))
    assert auto["techniques"]["cuda_graph"] and rows["+ --fold-batch-norm"]["objective"] > 0.9
    precisions = [row["peak_throughput"]["precision"] for row in (file, auto, plain)]
    assert precisions == ["tf32", "tf32", "fp32"]
    assert rows["+ a full logit cache"]["logit_cache"]
    assert bench.results["recommended"] == "absld train --engine auto"
    if not cuda.is_pretend:
        memory = [row["memory_bytes"] for name, row in rows.items() if name not in left_out]
        assert min(memory) > 0
