"""What the compiler makes of the kernels, for GPUs that this machine does not have."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from kernels.resources import TARGETS, load_bytes

FIRST_OF_EACH = """
import json
from kernels.resources import measure, variants
shown = [v for v in variants() if v.kernel != "fused_logits" or v.name.startswith("argmax N=3 bf16")]
first = {variant.kernel: variant for variant in reversed(shown)}
print(json.dumps([measure(variant, target) for variant in first.values() for target in ("sm_90", "gfx942")]))
"""
KERNELS = {"fused_logits", "truncated_sample", "linear_cross_entropy", "layer", "row_linear", "attend"}
KEYS = {"kernel", "variant", "target", "registers", "spills", "shared_bytes", "load_bytes"}


def run_python(*arguments, interpreted="0"):
    environment = os.environ | {"TRITON_INTERPRET": interpreted}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "targets"),
    [
        (("-c", FIRST_OF_EACH), {"sm_90", "gfx942"}),
        pytest.param(("-m", "kernels.resources", "--json"), set(TARGETS), marks=pytest.mark.slow),
    ],
)
def test_no_spills_and_wide_loads(arguments, targets):
    done = run_python(*arguments)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {(row["kernel"], row["target"]) for row in rows} == {(k, target) for k in KERNELS for target in targets}
    for row in rows:
        assert row.keys() >= KEYS
        assert row["spills"] == 0, row
        if row["kernel"] != "layer":  # whose bytes are nothing
            # A row of W is divided among the threads of a program, twice as many on AMD's.
            least = 8 if (row["kernel"], row["target"]) == ("row_linear", "gfx942") else 16
            assert row["load_bytes"] in ((least, 16) if row["aligned"] else (2,)), row
        assert 0 < row["registers"] <= 255, row


def test_load_width_is_read_from_the_instructions():
    wide = "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];\n" * 6
    scalar = "ld.global.b32 {%r1}, [%rd2];\n"
    assert load_bytes(wide + scalar) == 16
    assert load_bytes("ld.global.b16 {%rs1}, [%rd1];\n" * 48 + scalar) == 2
    assert load_bytes("cp.async.cg.shared.global [%r1 + 0], [%rd1 + 0], 0x10, %r2;\n" * 4) == 16
    amd = "global_load_dwordx4 v[0:3], v[4:5], off\n" * 4 + "global_load_dword v1, v[2:3], off sc1\n" * 9
    assert load_bytes(amd) == 16


def test_interpreted_kernels_are_refused():
    done = run_python("-m", "kernels.resources", interpreted="1")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
