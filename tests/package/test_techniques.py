"""The engines: which techniques each chooses for a device, and what a run keeps of the choice."""

from dataclasses import asdict, replace

import pytest
import torch
from helpers.small_training import CONFIG, TRAIN, VALIDATION, image_set, network
from hypothesis import given
from hypothesis import strategies as st

import absld
from absld.config.evaluation_settings import EvaluationConfig
from absld.config.files import read_recipe, read_run_config, read_techniques
from absld.config.resolve import resolve
from absld.config.settings import TrainConfig
from absld.data.dataset import Splits
from absld.engine import precision, techniques
from absld.engine.techniques import (
    NAMES,
    NEUTRAL,
    Techniques,
    can_compile,
    choose_techniques,
    describe,
    with_techniques,
)
from absld.errors import CheckpointError, UsageError
from absld.evaluation.runner import run_network_evaluation
from absld.models.loading import load_network
from absld.progress import Observer
from absld.runs.training_run import train

CPU, CUDA = torch.device("cpu"), torch.device("cuda:1")
AUTO = Techniques(channels_last=True, cuda_graph=True, check_every=50)


def in_precision(name):
    return dict.fromkeys(("precision", "attack_precision", "teacher_precision"), name)


@pytest.fixture
def hardware(monkeypatch):
    """Set what the devices can do."""

    def have(capability=(8, 0), bf16=True, compiler=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(techniques.shutil, "which", lambda name: name if compiler else None)

    return have


@pytest.mark.parametrize("engine", ["plain", "auto"])
def test_on_a_cpu_nothing_is_on_unless_asked_for(engine, hardware):
    hardware()
    assert choose_techniques(TrainConfig(engine=engine), CPU) == Techniques()
    assert TrainConfig().engine == "auto"


def test_on_cuda_plain_is_ieee_with_nothing_on(hardware):
    hardware((9, 0))
    assert choose_techniques(TrainConfig(engine="plain"), CUDA) == Techniques()


@pytest.mark.parametrize(
    ("capability", "name"), [((9, 0), "tf32"), ((8, 0), "tf32"), ((7, 5), "fp32")]
)
def test_on_cuda_auto_computes_what_the_single_file_computes_there(capability, name, hardware):
    """TF32 where the device has it, channels-last; graph and rare checks change no number."""
    hardware(capability)
    chosen = choose_techniques(TrainConfig(), CUDA)
    assert chosen == replace(AUTO, **in_precision(name))
    changed = {n for n in NAMES if getattr(chosen, n) != getattr(Techniques(), n)}
    assert changed - NEUTRAL <= {"channels_last", *in_precision(name)}


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("compiler", [True, False])
def test_fast_has_all_that_the_device_has(device, bf16, compiler, hardware):
    hardware((8, 6) if bf16 else (7, 0), bf16, compiler)
    base = AUTO if device == CUDA else Techniques()
    expected = replace(base, fold_batch_norm=True, channels_last=True)
    expected = replace(expected, compile=compiler and device == CPU)
    if bf16:
        expected = replace(expected, **in_precision("bf16"))
    assert choose_techniques(TrainConfig(engine="fast"), device) == expected


def test_nothing_is_compiled_without_triton_or_headers(hardware, monkeypatch):
    hardware()
    assert can_compile(CPU) and not can_compile(torch.device("mps"))
    monkeypatch.setattr(techniques.importlib.util, "find_spec", lambda name: None)
    assert not can_compile(CUDA)
    monkeypatch.setattr(techniques.sysconfig, "get_path", lambda name: "nowhere")
    assert not can_compile(CPU)


def test_single_settings_override_the_engine(hardware):
    hardware((9, 0))
    config = TrainConfig(engine="fast", precision="fp32", compile=False, cuda_graph=False)
    expected = Techniques(fold_batch_norm=True, channels_last=True, check_every=50)
    assert choose_techniques(config, CUDA) == expected
    config = TrainConfig(attack_precision="bf16", check_every=7)
    expected = Techniques(attack_precision="bf16", check_every=7)
    assert choose_techniques(config, CPU) == expected


PRECISIONS = st.none() | st.sampled_from(["fp32", "tf32", "bf16"])
SETTINGS = st.fixed_dictionaries(
    {"engine": st.sampled_from(["plain", "auto", "fast"])}
    | dict.fromkeys(in_precision("fp32"), PRECISIONS)
    | dict.fromkeys(("fold_batch_norm", "channels_last", "compile"), st.none() | st.booleans())
    | {"check_every": st.none() | st.integers(1, 60)}
)


@given(SETTINGS, st.sampled_from([(9, 0), (7, 0)]), st.sampled_from([CPU, CUDA]))
def test_given_settings_are_kept_and_the_others_filled_in(settings, capability, device):
    config = TrainConfig(**settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        chosen = choose_techniques(config, device)
        filled = with_techniques(config, chosen)
        given = {name: value for name, value in settings.items() if value is not None}
        assert given.items() <= asdict(filled).items()
        assert asdict(chosen).items() <= asdict(filled).items()
        assert None not in asdict(chosen).values()
        assert choose_techniques(filled, device) == chosen


@pytest.mark.parametrize("machine", ["aarch64", "x86_64"])
@pytest.mark.parametrize("onednn", [True, False])
def test_bfloat16_is_computed_only_where_onednn_computes_it(machine, onednn, hardware, monkeypatch):
    """On x86 it says so of processors that emulate it, too; it says no where a person limits it."""
    for instructions in (True, False):
        hardware(bf16=instructions)
        monkeypatch.setattr(precision.platform, "machine", lambda: machine)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
        expected = onednn and (instructions or machine == "aarch64")
        assert precision.computes_bf16(CPU) is expected
    assert precision.computes_bf16(torch.device("meta")) is False


def test_a_description_names_what_is_on(hardware):
    hardware()
    assert describe(Techniques()) == "fp32"
    mixed = Techniques(teacher_precision="bf16", fold_batch_norm=True, check_every=9)
    assert describe(mixed) == "fp32, teacher bf16, folded batch norm, NaN check every 9 steps"
    auto = choose_techniques(TrainConfig(), CUDA)
    assert describe(auto) == ("tf32, channels-last, CUDA graphs, NaN check every 50 steps")


def test_emulated_bfloat16_is_warned_of(hardware, tmp_path):
    hardware(bf16=False)
    warning = "warning: cpu has no bfloat16 instructions and emulates them slowly"
    assert precision.emulation_warnings(["fp32", "bf16"], CPU) == [warning]
    assert precision.emulation_warnings(["fp32", "tf32"], CPU) == []
    observer = Notes()
    result = run_of(tmp_path, observer, teacher_precision="bf16")
    assert warning in observer.notes
    evaluation = EvaluationConfig(
        attacks="fgsm", precision="bf16", epsilon=0.1, norm="linf", checks=False
    )
    network = load_network(str(result.run), 3, ("any",))
    observer = Notes()
    run_network_evaluation(str(result.run), network, VALIDATION, evaluation, observer)
    assert warning in observer.notes
    hardware(bf16=True)
    assert precision.emulation_warnings(["bf16"], CPU) == []


# --- Runs ---

SPLITS = Splits(TRAIN, VALIDATION, VALIDATION)


class Notes(Observer):
    """Keeps the notes; interrupts the training of an epoch if told to."""

    def __init__(self, stop_in=0):
        self.notes, self.stop_in = [], stop_in

    def note(self, text):
        self.notes.append(text)

    def step(self, report):
        if report.epoch == self.stop_in:
            raise absld.Interrupted(15)


def run_of(out, observer, resume=False, **settings):
    given = {"dataset": "folder", "epochs": 2, "batch_size": 4, "attack_steps": 2, "padding": 1}
    given |= {"student": "convnet", "teacher_model": "convnet", "teacher_epochs": 1}
    given |= {"allow_weak_teacher": True, "device": "cpu", "out": str(out)}
    return train(resolve(given | settings), observer, resume=resume, splits=SPLITS)


def test_a_run_records_what_was_given_and_what_its_engine_chose(tmp_path):
    observer = Notes()
    result = run_of(tmp_path, observer, fold_batch_norm=True)
    path = result.run / "config.toml"
    assert read_techniques(path) == asdict(Techniques(fold_batch_norm=True))
    config = read_run_config(path)
    assert (config.precision, config.fold_batch_norm, config.compile) == (None, True, None)
    assert "engine auto: fp32, folded batch norm" in observer.notes


def test_techniques_that_were_edited_are_refused(tmp_path):
    path = run_of(tmp_path, Notes()).run / "config.toml"
    path.write_text(path.read_text().replace('\nprecision = "fp32"', '\nprecision = "bf16"'))
    with pytest.raises(CheckpointError, match="has changed since the run wrote it"):
        run_of(tmp_path, Notes(), resume=True)


def test_a_run_is_resumed_with_the_numbers_of_its_beginning(tmp_path, monkeypatch):
    """On a device for which the engine chooses otherwise: the run and its teacher are found, and
    only techniques without effect on numbers are chosen anew."""
    chosen = {"fold_batch_norm": True, "check_every": 3}
    monkeypatch.setattr(techniques, "engine_choice", lambda engine, device: dict(chosen))
    whole = run_of(tmp_path / "whole", Notes())
    with pytest.raises(absld.Interrupted):
        run_of(tmp_path / "other", Notes(stop_in=2))
    chosen.update(fold_batch_norm=False, channels_last=True, check_every=2)
    resumed = run_of(tmp_path / "other", Notes(), resume=True)
    assert resumed.student_sha256 == whole.student_sha256
    assert len(list((tmp_path / "other").glob("*-teacher-*"))) == 1
    begun = read_techniques(resumed.run / "config.toml")
    assert begun == asdict(Techniques(fold_batch_norm=True, check_every=2))


def test_a_setting_that_equals_the_choice_of_the_engine_is_another_run(tmp_path, monkeypatch):
    """On another device the engine may choose otherwise; what was asked for stays."""
    monkeypatch.setattr(techniques, "engine_choice", lambda *given: {"precision": "bf16"})
    left_open = run_of(tmp_path, Notes())
    monkeypatch.undo()
    asked_for = run_of(tmp_path, Notes(), precision="fp32")
    assert asked_for.run != left_open.run
    assert asked_for.student_sha256 != left_open.student_sha256


def test_the_config_of_a_run_as_a_recipe_leaves_the_choice_to_the_engine(tmp_path):
    result = run_of(tmp_path, Notes())
    recipe = read_recipe(str(result.run / "config.toml"))
    again = train(resolve(recipe), Notes(), resume=True, splits=SPLITS)
    assert again.run == result.run and again.student_sha256 == result.student_sha256
    fast = resolve(recipe | {"engine": "fast"})
    assert choose_techniques(fast, CPU).fold_batch_norm


def test_a_checkpoint_of_other_techniques_is_refused(tmp_path):
    """`fit` itself has only the settings that it is given."""

    def train_in(**settings):
        data = image_set(), image_set(9, seed=1)
        config = replace(CONFIG, epochs=1, **settings)
        with absld.RunDirectory(tmp_path) as run:
            list(absld.fit(network("student"), network("teacher"), *data, config, run=run))

    train_in(channels_last=True)
    train_in(channels_last=True, check_every=9)
    with pytest.raises(CheckpointError, match="channels_last is True in the run, False now"):
        train_in()


def test_a_graph_is_refused_where_there_is_none():
    with pytest.raises(UsageError, match="--cuda-graph needs a CUDA device, not cpu"):
        choose_techniques(TrainConfig(cuda_graph=True), CPU)
