"""Launchers: flags of a training, settings, jobs as processes here and as jobs of a real Slurm."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.program import QUICK, main, refused, the_run

import absld
from absld.config.launcher_settings import LauncherSettings, launcher_settings
from absld.config.resolve import resolve
from absld.errors import AbsldError, BusyError, CheckpointError, Stopped, UsageError
from absld.progress import Observer
from absld.runs.jobs import Job, log_of
from absld.runs.launching import to_flags
from absld.runs.local_launcher import LocalLauncher
from absld.storage.run_directory import RunDirectory

TWO = ["--methods", "rslad,sat"]


class Told(Observer):
    def __init__(self):
        self.lines = []

    def wait(self, text):
        self.lines.append(text)


def job(folder, name, code, *needs):
    """A job whose process runs Python code in the folder; it writes its name when it ends."""
    after = f"open('order', 'a').write('{name} ')"
    lines = "import os, signal, sys, time", UNTIL, code, after
    command = (sys.executable, "-c", "\n".join(lines))
    return Job(name, RunDirectory(folder / name, folder), 1, (command,), bool, needs)


UNTIL = """
def until(name, words):
    end = time.monotonic() + 60
    while not (os.path.exists(name) and len(open(name).read().split()) >= words):
        assert time.monotonic() < end, f"no {words} words in {name}"
        time.sleep(0.01)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- Settings ---


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"method": "ard", "seed": -3, "milestones": (), "epsilon": "8/255", "max_steps": 2},
        {"dataset": "cifar10", "norm": "l2", "data": "a folder=x", "compile": False},
    ],
    ids=["default", "a method", "l2"],
)
def test_a_training_of_a_launcher_has_the_settings_of_one_here(given, monkeypatch):
    config, seen = resolve(given, schedule_of_method=False), []

    def stop(config, *_, resume, **__):
        seen.append((config, resume))
        raise UsageError("seen", "")

    monkeypatch.setattr("absld.runs.training_run.train", stop)
    assert main("train", *to_flags(config), "--resume") == 2
    assert seen == [(config, True)]


@pytest.mark.parametrize(
    ("flags", "cause", "hint"),
    [
        (["--launcher", "slrm"], "one of here, local, slurm, not 'slrm'", "did you mean 'slurm'"),
        (["--jobs", "2"], "--jobs is not a setting of --launcher here", "--launcher local"),
        (["--launcher", "local", "--gpus", "1"], "--gpus is not a setting of", "--launcher slurm"),
        (["--launcher", "local", "--jobs", "0"], "jobs must be 1 or more, not 0", "--help"),
        (["--launcher", "slurm", "--time", "1:30"], "not '1:30'", "1:30:00"),
        (
            ["--launcher", "slurm", "--time", "1", "--notice", "60"],
            "leaves no time beside",
            "longer than --notice",
        ),
        (["--launcher", "slurm", "--gpus", "4"], "gpus takes 0, 1 or TYPE:1", "/cluster/"),
        (["--launcher", "slurm", "--memory", "16 GB"], "a size such as 16G", "500M"),
        (["--launcher", "slurm", "--slurm", "gone.toml"], "gone.toml: No such file", "TOML"),
        (["--launcher", "slurm", "--slurm", "bad.toml"], "no Slurm setting 'partion'", "'partit"),
        (["--launcher", "slurm", "--slurm", "odd.toml"], "control character", "one line"),
        (["--launcher", "slurm", "--slurm", "new.toml"], "no Slurm setting 'nodes'", "there are: "),
    ],
)
def test_settings_that_a_launcher_does_not_have_are_refused(flags, cause, hint, folder, capfd):
    Path("bad.toml").write_text('partion = "gpu"\n')
    Path("new.toml").write_text("nodes = 3\n")
    Path("odd.toml").write_text(r'account = "a\ntouch seen"')  # would be a line of the batch script
    refused(capfd, 2, cause, hint, "compare", *TWO, *flags)


def test_finished_runs_are_compared_without_a_launcher(capfd):
    refused(capfd, 2, "launcher cannot be set", "omit", "compare", "a", "b", "--launcher", "local")
    refused(capfd, 2, "status cannot be set", "omit it", "compare", "a run", "b", "--status")


def test_flags_override_a_file_of_slurm_settings(folder):
    Path("slurm.toml").write_text('partition = "gpu"\ntime = 90\ngpus = "a100:1"\n')
    flags = {"launcher": "slurm", "slurm": "slurm.toml", "time": "1-02:00:30"}
    settings = launcher_settings(flags)
    assert (settings.partition, settings.gpus, settings.minutes()) == ("gpu", "a100:1", 1561)
    assert LauncherSettings(launcher="slurm", time="2:00:00").minutes() == 120


@pytest.mark.usefixtures("few_digits_in_an_empty_folder")
@pytest.mark.parametrize("missing", ["squeue", "submitit"])
def test_a_machine_without_slurm_says_so(missing, capfd, monkeypatch):
    monkeypatch.setenv("PATH", os.getcwd())
    if missing == "submitit":
        monkeypatch.setitem(sys.modules, "submitit", None)
    found = {"squeue": ("there is no squeue", "--launcher local"),
             "submitit": ("needs submitit", "pip install 'absld[slurm]'")}  # fmt: skip
    refused(capfd, 2, *found[missing], "compare", *TWO, "--launcher", "slurm", "--device", "cpu")


# --- Processes on this machine ---


def test_a_teacher_is_first_and_others_do_not_wait_for_it(folder):
    teacher = job(folder, "teacher", "until('order', 1)")
    jobs = [teacher, job(folder, "student", "pass", teacher), job(folder, "other", "pass")]
    LocalLauncher(2, []).run(jobs, Observer())
    assert Path("order").read_text() == "other teacher student "


def test_failures_are_named_with_their_logs_and_others_go_on(folder):
    teacher = job(folder, "teacher", "sys.exit('no data')")
    killed = job(folder, "killed", "os.kill(os.getpid(), signal.SIGKILL)")
    jobs = [teacher, job(folder, "student", "pass", teacher), killed, job(folder, "other", "pass")]
    with pytest.raises(AbsldError) as caught:
        LocalLauncher(1, []).run(jobs, Observer())
    text = str(caught.value)
    assert text.startswith("3 of 4 jobs failed: teacher (exit code 1), ")
    assert "student (not started, teacher failed)" in text
    assert "killed (killed by signal 9)" in text and f"{log_of(teacher)}" in text
    assert log_of(teacher).read_text() == "no data\n" and Path("order").read_text() == "other "


def test_a_run_in_which_another_process_is_at_work_is_waited_for(folder, monkeypatch):
    monkeypatch.setattr("absld.runs.local_launcher.WAIT", 0.3)
    code = f"os.path.exists('tried') or (open('tried', 'w'), sys.exit({BusyError.exit_code}))"
    told = Told()
    LocalLauncher(1, []).run([job(folder, "a", code), job(folder, "b", "pass")], told)
    assert Path("order").read_text() == "b a "
    assert "a: waiting, another command's process is at work in it" in told.lines


def test_each_job_has_a_device(folder):
    seen = "open('seen', 'a').write(os.environ['CUDA_VISIBLE_DEVICES'] + ' ')"
    jobs = [job(folder, str(n), f"{seen}; until('seen', {2 + n // 2 * 2})") for n in range(4)]
    LocalLauncher(2, ["3", "GPU-5"]).run(jobs, Observer())
    assert sorted(Path("seen").read_text().split()) == ["3", "3", "GPU-5", "GPU-5"]


def test_a_signal_lets_the_processes_save_and_stop(folder):
    code = (
        "signal.signal(signal.SIGUSR1, lambda *_: (open('saved', 'w'), sys.exit(138)));"
        "open('began', 'w'); time.sleep(30)"
    )

    def stop(number, frame):
        raise Stopped(130)

    before = signal.signal(signal.SIGUSR2, stop)

    def send():
        while not Path("began").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR2)

    threading.Thread(target=send).start()
    told = Told()
    try:
        with pytest.raises(Stopped):
            LocalLauncher(1, []).run([job(folder, "a", code), job(folder, "b", "pass")], told)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert Path("saved").exists() and not Path("order").exists()
    assert told.lines[-1].startswith("stopping 1 trainings: each saves its state")


def test_folders_of_jobs_are_private(folder, monkeypatch):
    (one := job(folder, "one", "pass")).run.path.parent.joinpath("jobs").mkdir(mode=0o755)
    log = log_of(one)
    for private in log.parents[:2]:
        assert private.stat().st_mode & 0o777 == 0o700
    other = job(folder, "other", "pass")
    (folder / "jobs/other").symlink_to(folder)
    with pytest.raises(CheckpointError, match="a link"):
        log_of(other)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(CheckpointError, match="belongs to somebody else"):
        log_of(one)


# --- Teachers alone ---


@pytest.mark.usefixtures("few_digits_in_an_empty_folder")
def test_a_teacher_trained_alone_is_the_teacher_of_the_run(capfd):
    assert main("teacher", "train", *QUICK) == 0
    teacher = str(the_run("teacher"))
    assert capfd.readouterr().out.splitlines()[-1] == teacher and not list(Path().glob("*/*absld*"))
    trained = Path(teacher, "best.pt").stat().st_mtime_ns
    assert main("train", *QUICK) == 0
    assert f"teacher: {teacher}" in capfd.readouterr().out
    assert Path(teacher, "best.pt").stat().st_mtime_ns == trained
    refused(capfd, 2, "trains no teacher: its method needs none", "absld train",
            "teacher", "train", *QUICK, "--method", "sat")  # fmt: skip
    refused(capfd, 2, f"trains no teacher: --teacher {teacher} is given", "absld train",
            "teacher", "train", *QUICK, "--teacher", teacher)  # fmt: skip


# --- Real trainings ---

SMALL = [
    *("compare", "--methods", "rslad,sat", "--epochs", "4"),
    *("--teacher-epochs", "4", "--allow-weak-teacher", "--attacks", "fgsm", "--no-checks"),
    *("--device", "cpu"),
]


@pytest.fixture
def absld_in(tmp_path, single_thread):
    """Start the program in a folder, as a process, which ends with the test."""
    environment = single_thread | {"PYTHONPATH": str(Path(absld.__file__).parents[1])}

    started = []

    def start(*flags):
        process = subprocess.Popen(
            [sys.executable, "-m", "absld", *SMALL, *flags],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def output(process, code=0):
    text = process.communicate(timeout=600)[0]
    assert process.returncode == code, text
    return text


def results(folder):
    (path,) = folder.glob("comparison-*/comparison.json")
    return [
        (m["name"], {k: v for k, v in m["figures"].items() if k != "seconds"}, m["differences"])
        for m in json.loads(path.read_text())["methods"]
    ]


def until(condition, process):
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The results of the comparison in one process."""
    folder = tmp_path_factory.mktemp("here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(*SMALL) == 0
    return results(folder / "runs")


@pytest.mark.slow
def test_two_local_jobs_stopped_and_resumed_give_the_results_of_one_process(
    tmp_path, absld_in, here
):
    local = ["--launcher", "local", "--jobs", "2"]
    process = absld_in(*local)
    until(lambda: list(tmp_path.glob("runs/digits-rslad-*/metrics.jsonl")), process)
    process.send_signal(signal.SIGINT)
    text = output(process, 130)
    assert "each saves its state" in text and "Continue with the same command." in text
    assert "interrupted" in output(absld_in("--status"))
    text = output(absld_in(*local))
    assert results(tmp_path / "runs") == here
    states = json.loads(output(absld_in("--status", "--json")))["trainings"]
    assert [s["state"] for s in states] == ["finished"] * 3


needs_slurm = pytest.mark.skipif(
    not shutil.which("sbatch") or subprocess.run(["sinfo"], capture_output=True).returncode != 0,
    reason="no Slurm answers: install slurm-wlm and munge, write /etc/slurm/slurm.conf with this "
    "machine as the only node, start munged, slurmctld and slurmd",
)


@pytest.mark.slow
@needs_slurm
def test_jobs_of_slurm_preempted_and_killed_give_the_results_of_one_process(
    tmp_path, absld_in, here
):
    """A job gets the signal before its time limit, one is killed; a second command joins."""
    slurm = ["--launcher", "slurm", "--time", "30"]
    process = absld_in(*slurm)
    until((tmp_path / "runs/jobs/.lock").exists, process)
    second = absld_in(*slurm)
    for kind, sent in (("teacher", "USR2"), ("sat", "KILL")):
        records = f"runs/digits-{kind}-seed0-*/metrics.jsonl"
        until(lambda records=records: list(tmp_path.glob(records)), process)
        number = queued()[f"digits-{kind}-seed0"]
        subprocess.run(["scancel", f"--signal={sent}", number], check=True)
    assert "sat, seed 0 (" in output(process, 1)
    joined = output(second, 1)
    assert "is in the queue as job" in joined and "submitted as job" not in joined
    assert "Requeued job" in (next(tmp_path.glob("runs/jobs/*teacher-seed0*/log.txt")).read_text())
    output(absld_in(*slurm))
    assert results(tmp_path / "runs") == here


def queued():
    """Numbers of the jobs in the queue, by the beginnings of their names."""
    command = ["squeue", "--me", "--noheader", "--format=%j %i"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    pairs = (line.rsplit(" ", 1) for line in lines[:-1])
    return {name.rsplit("-", 2)[0]: number for name, number in pairs}
