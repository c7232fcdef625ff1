"""Runs the steps of a study in parallel, each as soon as its inputs are done: one line for each, and a bar over all."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from eval.study.config import Run
from eval.study.graph import Step, Store
from minillama.errors import InputError, Interrupted

LOG = "log.txt"
ROOT = Path(__file__).resolve().parents[2]
Active = dict[Future[float], tuple[Step, list[int]]]  # running steps and their slots


class Runner:
    """`run` returns when every step is done. A slot is a device of the settings, or a job where there are none."""

    def __init__(self, store: Store, settings: Run) -> None:
        self.store, self.settings = store, settings
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.stopped = False
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.free_slots = list(range(len(self.settings.devices) or self.settings.jobs))
        self.slot_count = len(self.free_slots)
        self.guard = threading.Lock()

    def run(self, steps: Sequence[Step]) -> None:
        """Run the steps that are not done; each must come after its inputs.

        Raises InputError for a command that failed, or Interrupted, after the running steps have ended.
        """
        pending = {step.key: step for step in steps if not self.store.is_done(step)}
        total = len(pending)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        with bar, ThreadPoolExecutor(self.slot_count) as pool:
            task = bar.add_task("steps", total=total)
            active: Active = {}
            failure: InputError | None = None
            try:
                while True:
                    if failure is None:
                        self._start_ready(pool, pending, active)
                    if not active:
                        break
                    names = ", ".join(step.name for step, _ in active.values())
                    bar.update(task, description=names, completed=total - len(pending))
                    for future in wait(active, return_when=FIRST_COMPLETED).done:
                        step, slots = active.pop(future)
                        self.free_slots += slots
                        try:
                            seconds = future.result()
                        except InputError as error:
                            failure = failure or error
                            continue
                        del pending[step.key]
                        self.console.print(f"[{total - len(pending)}/{total}] {step.name}: {seconds:,.1f} s")
            except KeyboardInterrupt:
                self._terminate_all()
                done = total - len(pending)
                raise Interrupted(f"interrupted: {done} of {total} steps done; the same command resumes") from None
        if failure is not None:
            raise failure

    def _start_ready(self, pool: ThreadPoolExecutor, pending: dict[str, Step], active: Active) -> None:
        """Start steps whose inputs are done, in order, until the slots do not suffice for the next one."""
        running = [step for step, _ in active.values()]
        for step in pending.values():
            if step in running or any(before.key in pending for before in step.inputs):
                continue
            count = min(step.processes, self.slot_count)
            if len(self.free_slots) < count:
                break
            slots = [self.free_slots.pop(0) for _ in range(count)]
            active[pool.submit(self._run, step, slots)] = step, slots

    def _run(self, step: Step, slots: list[int]) -> float:
        """Run one step and record it; returns its seconds, 0 if another run has done it meanwhile."""
        store = self.store
        with store.locked(step, lambda: self.console.print(f"{step.name}: another run holds it; waiting")) as lock:
            if store.is_done(step):
                return 0.0
            started = time.time()
            command = store.command(step)
            processes = str(step.processes)
            launch = ["torch.distributed.run", "--nproc-per-node", processes, "-m"] if step.processes > 1 else []
            log = store.folder(step) / LOG
            exit_code, peak_memory = self._execute([*launch, *command], slots, log, lock)
            if exit_code != 0:
                raise InputError(f"{step.name}: exit code {exit_code} ({_last_line(log)}); see {log}")
            seconds = time.time() - started
            finished = time.strftime("%Y-%m-%dT%H:%M:%S")
            record = {"seconds": round(seconds, 2), "finished": finished, "peak_memory_bytes": peak_memory}
            store.finish(step, {**record, "command": command})
            return seconds

    def _execute(self, command: list[str], slots: list[int], log: Path, lock: int) -> tuple[int, int]:
        """Run `python -m` with the words of `command`; returns its exit code and its peak memory in bytes.

        The command inherits the file descriptor `lock`, so the lock is held until it has ended.
        """
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
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
        return process.returncode, usage.ru_maxrss * 1024

    def _environment(self, slots: list[int]) -> dict[str, str]:
        environment = dict(os.environ)
        if self.settings.threads:
            environment["OMP_NUM_THREADS"] = str(self.settings.threads)
        if self.settings.devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.settings.devices[slot] for slot in slots)
        # Commands import this copy of the packages, from whatever folder the study is run.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return environment

    def _terminate_all(self) -> None:
        """Ask every command to save and end; the pool then waits for them."""
        with self.guard:
            self.stopped = True
            for process in self.running.values():
                process.send_signal(signal.SIGTERM)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it printed nothing"
