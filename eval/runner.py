"""Runs the steps of a study: several side by side, what is ready first, a line for each and a bar over the whole."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from eval.graph import Step, Store
from eval.study import Run
from minillama.errors import InputError, Interrupted

LOG = "log.txt"


class StepFailed(InputError):
    """A command ended with another code than 0; the text has its last line and where all of it is."""


@dataclass
class Runner:
    """`run` returns when every step is done; raises StepFailed or Interrupted after the running ones have ended."""

    store: Store
    settings: Run
    quiet: bool = False
    running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    stopped: bool = False

    def __post_init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.places = len(self.settings.devices) or self.settings.jobs
        self.free = list(range(self.places))
        self.guard = threading.Lock()

    def run(self, steps: Sequence[Step], on_step: Callable[[], None] = lambda: None) -> None:
        """steps: inputs before what needs them.   on_step: called after each."""
        waiting = {step.key: step for step in steps if not self.store.is_done(step)}
        total = len(waiting)
        numbers = iter(range(1, total + 1))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        bar = Progress(*columns, console=self.console, transient=True) if self.console.is_terminal else None
        with bar or nullcontext(), ThreadPoolExecutor(self.places) as pool:
            task = bar.add_task("steps", total=total) if bar else None
            active: dict[Future[float], tuple[Step, list[int]]] = {}
            failure: BaseException | None = None
            try:
                while waiting or active:
                    for step in list(waiting.values()) if failure is None else []:
                        wanted = min(step.slots, self.places)
                        if any(before.key in waiting for before in step.inputs) or _runs(active, step):
                            continue
                        if len(self.free) < wanted:
                            break
                        slots = [self.free.pop(0) for _ in range(wanted)]
                        active[pool.submit(self._run, step, slots)] = step, slots
                    if not active:
                        break
                    if bar is not None and task is not None:
                        bar.update(task, description=", ".join(step.name for step, _ in active.values()))
                    for future in wait(active, return_when=FIRST_COMPLETED).done:
                        step, slots = active.pop(future)
                        self.free += slots
                        try:
                            seconds = future.result()
                        except InputError as error:
                            failure = failure or error
                            continue
                        del waiting[step.key]
                        on_step()
                        if bar is not None and task is not None:
                            bar.advance(task)
                        self._say(f"[{next(numbers)}/{total}] {step.name}: {seconds:,.1f} s")
            except KeyboardInterrupt:
                self._end_all()
                done = total - len(waiting)
                raise Interrupted(f"interrupted: {done} of {total} steps done; the same command goes on") from None
        if failure is not None:
            raise failure

    def _run(self, step: Step, slots: list[int]) -> float:
        store = self.store
        with store.locked(step, lambda: self._say(f"{step.name}: another run has it; waiting")) as lock:
            if store.is_done(step):  # by that other run
                return 0.0
            started = time.time()
            words = store.command(step)
            launch = ["torch.distributed.run", "--nproc-per-node", str(step.slots), "-m"] if step.slots > 1 else []
            log = store.folder(step) / LOG
            with open(log, "ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", *launch, *words],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=self._environment(slots),
                    pass_fds=(lock,),
                    start_new_session=True,
                )
            with self.guard:
                self.running[process.pid] = process
                if self.stopped:
                    process.send_signal(signal.SIGTERM)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            with self.guard:
                del self.running[process.pid]
            if process.returncode != 0:
                raise StepFailed(f"{step.name}: exit code {process.returncode} ({_last_line(log)}); see {log}")
            seconds = time.time() - started
            store.finish(
                step,
                {
                    "seconds": round(seconds, 2),
                    "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
                    "peak_memory_bytes": usage.ru_maxrss * 1024,
                    "command": words,
                },
            )
            return seconds

    def _environment(self, slots: list[int]) -> dict[str, str]:
        environment = dict(os.environ)
        if self.settings.threads:
            environment["OMP_NUM_THREADS"] = str(self.settings.threads)
        if self.settings.devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.settings.devices[slot] for slot in slots)
        # A command's packages are ours, wherever the study is run from.
        here = str(Path(__file__).resolve().parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        return environment

    def _end_all(self) -> None:
        """Ask every command to save and end; the pool then waits for them."""
        with self.guard:
            self.stopped = True
            for process in self.running.values():
                process.send_signal(signal.SIGTERM)

    def _say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text)


def _runs(active: dict[Future[float], tuple[Step, list[int]]], step: Step) -> bool:
    return any(other is step for other, _ in active.values())


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it printed nothing"
