"""The test run itself: its filters of warnings, and the state that tests leave for others."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


def warn(category, module):
    warnings.warn_explicit("as of now", category, "file.py", 1, module=module)


@pytest.mark.parametrize(
    "module",
    ["gradfilter.grads._joined_stacks", "test_stack", "tests._lab", "_cases", "benchmarks.rules"],
)
def test_warnings_that_point_into_this_project_are_errors(module):
    with pytest.raises(UserWarning, match="as of now"):
        warn(UserWarning, module)


@pytest.mark.parametrize("category", DEPRECATIONS)
def test_what_the_package_calls_and_others_deprecate_is_an_error(category):
    with pytest.raises(category, match="as of now"):
        warn(category, "gradfilter.distributed._ranks")


@pytest.mark.filterwarnings("ignore:as of now")  # before the lines of pyproject.toml: see below
def test_a_mark_of_a_test_goes_before_the_filters_of_the_project():
    warn(UserWarning, "gradfilter")


@pytest.mark.parametrize("category", [UserWarning, *DEPRECATIONS])
@pytest.mark.parametrize("module", ["torch.distributed.c10d_logger", "lightning", "numpy"])
def test_what_others_say_of_themselves_is_not(module, category):
    with warnings.catch_warnings(record=True) as caught:
        warn(category, module)
    assert len(caught) == 1


@pytest.mark.parametrize("category", DEPRECATIONS)
def test_what_a_test_calls_and_others_deprecate_is_not(category):
    with warnings.catch_warnings(record=True) as caught:
        warn(category, "test_lightning")
    assert len(caught) == 1


EXAMPLES = '''
import os, signal
import pytest
import torch.distributed as dist

def example():
    """
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> 1 + 1
    3
    """

def test_none_is_open():
    assert not dist.is_initialized()

@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals(name, usual_signals):
    number = getattr(signal, name)
    if name == "SIGINT":
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    elif os.fork() == 0:
        signal.raise_signal(number)
        os._exit(0)
    else:
        assert os.waitstatus_to_exitcode(os.wait()[1]) == -number

def test_deaf_again():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        assert signal.getsignal(number) == signal.SIG_IGN
'''


def deaf():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_failed_example_and_the_signals_of_who_started_the_run_reach_no_other_test(tmp_path):
    (tmp_path / "test_examples.py").write_text(EXAMPLES)
    config = ["-c", str(ROOT / "pyproject.toml"), "-p", "conftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *config, "test_examples.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.getenv("PYTHONPATH", "")])},
        preexec_fn=deaf,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert "1 failed, 5 passed" in done.stdout, done.stdout
    assert "::test_examples.example\n" in done.stdout, done.stdout


def strict():
    """Make every warning in this rank an error, and forget to undo it."""
    warnings.simplefilter("error")


def lenient():
    warnings.warn("a third party's notice", stacklevel=1)


def test_a_rank_that_makes_warnings_errors_does_so_for_itself_alone(two):
    two.run(strict)
    two.run(lenient)


@pytest.mark.slow
def test_to_import_the_benchmarks_changes_no_setting_of_later_tests():
    code = (
        "import os, pkgutil, importlib, benchmarks\n"
        "before = dict(os.environ)\n"
        "for part in pkgutil.iter_modules(benchmarks.__path__):\n"
        "    if part.name != '__main__':\n"
        "        importlib.import_module(f'benchmarks.{part.name}')\n"
        "print(*set(os.environ) - set(before))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    # The profiler's notices, and where torch's compiler writes once it is imported.
    assert set(done.stdout.split()) <= {"KINETO_LOG_LEVEL", "TORCHINDUCTOR_CACHE_DIR"}
