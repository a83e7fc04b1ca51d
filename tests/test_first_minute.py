"""What a newcomer meets first: ~ in paths, data where a run had it, a dry run, folders that vanish, Ctrl-Z."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cifar10 import RunFailed, UsageError, at_home
from cifar10.__main__ import main as commands
from cifar10.config.recipe import PROJECT
from cifar10.plan import make_plan
from cifar10.run import folder as run_folder
from cifar10.run.stop import StopRequest
from tests.helpers import one_rank
from tests.launching import environment, wait_until

# --- ~ --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "expanded"),
    [
        ("~", "/home/me"),
        ("~/x", "/home/me/x"),
        ("--data-dir=~/x", "--data-dir=/home/me/x"),
        ("--output_dir=~", "--output_dir=/home/me"),
        ("a~/x", "a~/x"),
        ("x=~/y", "x=~/y"),
        ("--lr=0.1", "--lr=0.1"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x"),
    ],
)
def test_a_leading_tilde_is_the_home_folder(monkeypatch, word, expanded):
    monkeypatch.setenv("HOME", "/home/me")
    assert at_home([word]) == [expanded]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    return tmp_path


PATHS = {  # flags -> the path that is meant, in the options
    "--data-dir=~/d": lambda recipe, options: options.data_dir,
    "--data_dir ~/d": lambda recipe, options: options.data_dir,
    "--output-dir=~/d": lambda recipe, options: options.output_dir,
}


@pytest.mark.parametrize("flags", PATHS)
def test_every_flag_of_a_run_that_is_a_path_may_begin_at_home(home, flags):
    plan = make_plan(["--dataset", "synthetic", *flags.split()], 1, "test")
    assert PATHS[flags](plan.recipe, plan.options) == home / "d"


@pytest.mark.parametrize("flag", ["--weights", "--recipe", "--resume", "--deepspeed_config"])
@pytest.mark.parametrize("joined", [True, False])
def test_a_file_at_home_that_is_missing_is_named_as_it_was_looked_for(home, flag, joined):
    words = [f"{flag}=~/no/recipe.json"] if joined else [flag, "~/no/recipe.json"]
    with pytest.raises(UsageError, match=str(home / "no")):
        make_plan(["--dataset", "synthetic", *words], 1, "test")


def test_the_environments_data_folder_may_begin_at_home(home, monkeypatch):
    monkeypatch.setenv("CIFAR10_DIR", "~/d")
    assert make_plan(["--dataset", "synthetic"], 1, "test").options.data_dir == home / "d"
    assert run_folder.data_dir_of(None, None) == home / "d"


@pytest.mark.parametrize("argv", ["evaluate ~/run", "predict ~/run x.png", "export ~/run", "report ~/run", "leaderboard ~/run"])
def test_every_command_takes_paths_at_home(home, argv, capsys):
    code = commands(argv.split())
    assert str(home / "run") in "".join(capsys.readouterr())
    assert code == 2 or argv.startswith("leaderboard")


# --- the data of a run ------------------------------------------------------------------------------------------------------


def test_commands_look_where_the_run_had_its_data(home, monkeypatch):
    run, had = home / "run", home / "had"
    run.mkdir()
    had.mkdir()
    (run / "environment.json").write_text(
        json.dumps({"starts": [{"data_dir": str(had)}, {"data_dir": str(home / "gone")}, {}]})
    )
    assert run_folder.data_dir_of(run, None) == had
    assert run_folder.data_dir_of(run, home / "given") == home / "given"
    had.rmdir()
    assert run_folder.data_dir_of(run, None) == Path("data")
    monkeypatch.setenv("CIFAR10_DIR", str(home))
    assert run_folder.data_dir_of(run, None) == home
    for foreign in ("[]", '{"starts": {}}', '{"starts": [3, {"data_dir": 7}]}'):
        (run / "environment.json").write_text(f'{{"starts": {foreign}}}' if foreign == "[]" else foreign)
        assert run_folder.data_dir_of(run, None) == home


# --- the commit -------------------------------------------------------------------------------------------------------------


def git(folder: Path, *words: str) -> str:
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *names, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_copy_within_another_repository_is_not_of_its_commit(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "another")
    copy = tmp_path / "unzipped"
    copy.mkdir()
    monkeypatch.setattr(run_folder, "PROJECT", copy)
    assert run_folder._commit() is None
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))  # as in a hook
    assert run_folder._commit() is None
    monkeypatch.delenv("GIT_DIR")
    git(copy, "init", "-q")
    git(copy, "commit", "-q", "--allow-empty", "-m", "ours")
    assert run_folder._commit() == git(copy, "rev-parse", "HEAD")


# --- a folder that vanishes -------------------------------------------------------------------------------------------------


VANISH = {
    "deleted": shutil.rmtree,
    "moved": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "moved, and another in its place": lambda folder: (folder.rename(folder.with_name("elsewhere")), folder.mkdir()),
}


@pytest.fixture
def signals():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("how", VANISH)
def test_a_run_whose_folder_vanishes_fails_and_makes_no_new_one(tmp_path, signals, how):
    folder = tmp_path / "run"
    folder.mkdir()
    stop = StopRequest(one_rank(), folder)
    stop.check_folder()
    assert not stop.agreed()
    VANISH[how](folder)
    assert stop.agreed()  # at the next agreement
    with pytest.raises(RunFailed, match=f"{folder} was deleted or moved"):
        stop.check_folder()


# --- Ctrl-Z -----------------------------------------------------------------------------------------------------------------

SUPERVISOR = """
import os, sys
from cifar10.launch.supervise import Launch
launch = Launch([sys.executable, "-c", "import time; time.sleep(120)"], dict(os.environ))
print(launch._process.pid, flush=True)
sys.exit(launch.wait() != -15)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGTSTP")
def test_ctrl_z_stops_the_ranks_too_and_they_go_on_with_main(tmp_path):
    variables = environment(PYTHONPATH=str(PROJECT))
    with subprocess.Popen([sys.executable, "-c", SUPERVISOR], env=variables, stdout=subprocess.PIPE, text=True) as main:
        both = psutil.Process(main.pid), psutil.Process(int(main.stdout.readline()))
        for _ in range(2):
            main.send_signal(signal.SIGTSTP)
            wait_until(lambda: all(one.status() == psutil.STATUS_STOPPED for one in both), "all are stopped")
            main.send_signal(signal.SIGCONT)
            wait_until(lambda: all(one.status() != psutil.STATUS_STOPPED for one in both), "all go on")
        main.send_signal(signal.SIGTERM)
        assert main.wait(60) == 0


# --- a dry run --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["", "--weights imagenet --model resnet18", "--output-dir there"])
def test_a_dry_run_writes_and_downloads_nothing(home, monkeypatch, flags):
    monkeypatch.chdir(home)
    monkeypatch.setenv("CIFAR10_URL", "http://127.0.0.1:9/")
    plan = make_plan(["--dry-run", *flags.split()], 1, "test")
    assert plan.recipe.weights == "none"
    assert any("data: not all in data/cifar-10-batches-py" in note for note in plan.notes)
    assert len(plan.images("train")) == 50_000
    assert list(home.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("program", ["cifar10_deepspeed.py", "main.py"])
def test_a_dry_run_says_what_would_be_trained_and_for_how_long(home, program):
    words = [sys.executable, str(PROJECT / program), "--dry-run", "--threads", "1", "--epochs", "3"]
    variables = environment(HOME=str(home), CIFAR10_DIR=str(home / "data"))
    done = subprocess.run(words, cwd=home, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dry run: nothing is written" in done.stdout
    assert "1 rank on cpu, 1 thread" in done.stdout
    assert '"train_batch_size"' in done.stdout
    assert re.search(r"^time: about .* for [\d,]+ steps of .* and 3 evaluations of ", done.stdout, re.M)
    assert [path for path in home.rglob("*") if path.is_file() and ".cache" not in path.parts] == []


# --- on real machines -------------------------------------------------------------------------------------------------------

SMALL = "--dataset synthetic --max-steps 4 --log-every-steps 2 --test-images 100 --no-report --no-tensorboard".split()
needs_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare"
)


def in_namespace(before: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script in mount and network namespaces of its own, after these commands of a shell."""
    shell = ["unshare", "-m", "-n", "bash", "-ec", f'{before}\nexec "$@"', "bash"]
    command = [*shell, sys.executable, str(PROJECT / "cifar10_deepspeed.py"), *SMALL, *words]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True, check=False)


UP = "ip link set lo up"


@pytest.fixture
def half_a_cpu():
    """The cgroup.procs file of a cgroup with half a CPU, of whichever version this machine has."""
    roots = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    root = next((root for root in roots if (root / "cgroup.procs").exists()), None)
    if os.geteuid() != 0 or root is None:
        pytest.skip("needs root and cgroups")
    cgroup = root / f"half-a-cpu-{os.getpid()}"
    try:
        cgroup.mkdir()
        if (cgroup / "cpu.cfs_quota_us").exists():
            (cgroup / "cpu.cfs_quota_us").write_text("50000")
        else:
            (cgroup / "cpu.max").write_text("50000 100000")
    except OSError as error:
        pytest.skip(f"needs a cgroup that can be limited: {error}")
    yield cgroup / "cgroup.procs"
    cgroup.rmdir()


@pytest.mark.slow
def test_half_a_cpu_is_one_thread(tmp_path, half_a_cpu):
    words = ["bash", "-ec", f'echo $$ > {half_a_cpu}; exec "$@"', "bash", sys.executable, str(PROJECT / "cifar10_deepspeed.py")]
    variables = environment()
    variables.pop("OMP_NUM_THREADS", None)
    flags = [*SMALL, "--output-dir", str(tmp_path / "run")]
    done = subprocess.run([*words, *flags], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 rank on cpu, 1 thread" in done.stdout
    (start,) = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
    assert (start["cores"], start["threads"]) == (1, 1)


@pytest.mark.slow
@needs_root
def test_a_read_only_root(tmp_path):
    (tmp_path / "tmp").mkdir()
    remount = f"mount --bind {tmp_path} {tmp_path}; mount -o remount,ro,bind /; cd /"
    done = in_namespace(
        f"{UP}; {remount}", "--threads", "1", "--output-dir", str(tmp_path / "run"), TMPDIR=str(tmp_path / "tmp")
    )
    assert done.returncode == 0, done.stderr
    done = in_namespace(f"{UP}; {remount}", "--threads", "1", "--output-dir", "/run-of-a-test")
    assert done.returncode == 2
    assert "/run-of-a-test" in done.stderr


@pytest.mark.slow
@needs_root
@pytest.mark.parametrize(
    ("before", "code", "says"),
    [
        ("true", 2, "ip link set lo up"),
        (f"{UP}; ip addr del 127.0.0.1/8 dev lo", 0, ""),
        (f"{UP}; export GLOO_SOCKET_IFNAME=ib0", 2, "GLOO_SOCKET_IFNAME is ib0"),
    ],
)
def test_networks(tmp_path, before, code, says):
    done = in_namespace(before, "--threads", "1", "--output-dir", str(tmp_path / "run"))
    assert done.returncode == code, done.stderr
    assert says in done.stderr


@pytest.mark.slow
@needs_root
@pytest.mark.parametrize("kilobytes", [16, 600])
def test_a_full_disk_is_named_and_nothing_else(tmp_path, kilobytes):
    mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs {tmp_path}"
    done = in_namespace(f"{UP}; {mount}", "--threads", "1", "--output-dir", str(tmp_path / "run"))
    assert done.returncode == 1
    printed = done.stdout + done.stderr
    assert "No space left on device; make room on the disk" in printed
    assert "inline_container" not in printed
    assert "Traceback" not in printed
    assert done.stderr.splitlines()[-1].startswith("error: the trained weights could not be written; make room")
