"""One system in a process of its own: its memory is its own, and nothing that another one loaded helps or hinders it.

The parent sends one JSON object a line, {"call": method, ...arguments}, and gets one back: {"value": ...}, or
{"refused": reason} for what the system cannot do. While one process works the others sleep on their standard input.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PEERS = ("ctranslate2", "openvino")
ROOT = Path(__file__).resolve().parent.parent


class Refused(Exception):
    """The system is not installed, or does not do what was asked; the text says which."""


class Worker:
    """The parent's end. `load` first; a fault in the process raises RuntimeError with the end of what it said."""

    def __init__(self, system: str, threads: int, clock: str = "wall") -> None:
        self.system = system
        environment = os.environ | {
            "DECODE_BENCH_CLOCK": clock,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "decode.bench_worker", system, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )

    def ask(self, call: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words are read below
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().strip()[-2000:]
            raise RuntimeError(f"{self.system} ended with exit code {self.process.returncode} during {call}:\n{said}")
        reply = json.loads(line)
        if "refused" in reply:
            raise Refused(reply["refused"])
        return reply["value"]

    def close(self) -> None:
        """Ends the process; its memory is free when this returns."""
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.wait()
        self.errors.close()


def peak_megabytes() -> float:
    """The most memory that this process held. Linux keeps it per program; elsewhere `ru_maxrss` is near enough."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024, 1)


def make(system: str, arguments: Mapping[str, Any]) -> Any:
    """The system, loaded."""
    if system in PEERS:
        from decode import bench_peers

        return (bench_peers.CTranslate2 if system == "ctranslate2" else bench_peers.OpenVINO)(**arguments)
    from decode import bench_systems

    return (bench_systems.Ours if system == "ours" else bench_systems.Transformers)(**arguments)


def serve(system: str, threads: int) -> None:
    # Replies have a stream of their own: what a library prints must not come among them.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    from minillama import InputError

    torch.set_num_threads(threads)
    loaded: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        call = request.pop("call")
        value: Any
        try:
            if call == "load":
                loaded, value = make(system, request), None
            elif call == "convert":
                from decode.bench_peers import convert_for_ctranslate2

                value = str(convert_for_ctranslate2(Path(request["folder"]), Path(request["work"])))
            elif call == "peak":
                cuda = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
                value = {"peak_memory_megabytes": peak_megabytes(), "peak_device_megabytes": round(cuda, 1)}
            else:
                value = getattr(loaded, call)(**request)
            reply = {"value": value}
        except (InputError, ImportError) as error:
            reply = {"refused": str(error)}
        except Exception as error:
            # A peer that cannot load this model is left out and named; whatever else fails is a fault.
            if system not in PEERS or call not in ("load", "convert"):
                raise
            reply = {"refused": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
