"""A command ends with the exit code and the one line that it promises."""

import subprocess
import sys

import pytest
import torch

from minillama import InputError
from minillama.errors import Interrupted, exit_code
from minillama.machine import pick_device


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (3, 3)])
def test_what_main_returns_is_the_exit_code(returned, code, capsys):
    assert exit_code(lambda: returned) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("pairs.tsv:118: expected 2,\nfound 3"), 2, "error: pairs.tsv:118: expected 2, found 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted("12 of 30 sentences are in out.txt"), 130, "12 of 30 sentences are in out.txt"),
    ],
)
def test_an_error_is_one_line_and_its_code(error, code, line, capsys):
    def main():
        raise error

    assert exit_code(main) == code
    assert capsys.readouterr() == ("", line + "\n")


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 // 0)
    with pytest.raises(SystemExit) as caught:  # argparse has printed its usage
        exit_code(lambda: sys.exit(2))
    assert caught.value.code == 2


def test_a_reader_that_closes_the_pipe_causes_no_traceback():
    program = """
import sys
from minillama.errors import exit_code
sys.exit(exit_code(lambda: [print("a line") for _ in range(200000)] and None))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"a line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_devices_are_picked_or_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match=r"--device cuda: no CUDA device here; use --device cpu"):
        pick_device("cuda")
    with pytest.raises(InputError, match=r"--device gpu: unknown; use cpu, cuda or cuda:N"):
        pick_device("gpu")


@pytest.mark.parametrize("kind", ["SIGINT", "SIGTERM"])
def test_both_signals_interrupt_even_where_the_parent_ignored_them(kind):
    program = f"""
import os, signal, sys
from minillama.errors import exit_code
signal.signal(signal.{kind}, signal.SIG_IGN)  # what a script's background job inherits
sys.exit(exit_code(lambda: os.kill(os.getpid(), signal.{kind})))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
