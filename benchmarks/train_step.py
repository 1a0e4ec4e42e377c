"""One training step of a network, in fastblocks and in torch's ways of running the stock network.

A step is zero_grad, forward, cross-entropy, backward and SGD with momentum. Each mode has a process of its own and all
stay alive; turns are interleaved (A B C A B C ...), so a slow spell of the machine falls on everybody. A turn is one
step that does not count and `--steps` that do; ratios are medians over rounds of the ratio within a round. Before
anything is timed, the first step's loss and norm of gradients are compared with plain torch's.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --model shufflenet_v2_x1_0 --malloc-tuned --memory --json step.json

--malloc-tuned starts torch's processes with a glibc that keeps its memory instead of giving it back to the kernel
between steps. fastblocks, which keeps memory by itself, runs as it comes, and once more with that setting.

--memory adds the most memory that a step has in use at a time, above what the process held with model and batch made
and no step taken: activations, gradients, the optimizer's state and the allocator's waste. For torch.compile it
includes what compiling has left in the process.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rss import resident, sampler

from fastblocks.bench.process import Peer, environment, reply
from fastblocks.bench.words import counted, torch_version

LABELS = {
    "eager": "torch eager",
    "channels_last": "torch eager, channels_last",
    "compile": "torch.compile",
    "compile_channels_last": "torch.compile, channels_last",
    "fastblocks": "fastblocks",
    "fastblocks_numba": "fastblocks, numba tier",
    "fastblocks_tuned": "fastblocks, glibc keeps memory",
}
MODES = tuple(mode for mode in LABELS if mode != "fastblocks_tuned")
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
TOLERANCES = {
    "loss": 1e-3,
    "norm": 2e-2,
}  # values at the kinks of ReLU6 move the gradients of one float32 from another's
WARM_UP = 3
REST = 0.05  # seconds before an answer, in which OpenMP's threads stop spinning

Step = Callable[[], Any]


# ------------------------------------------------------------------------------------------------- in a mode's process


def make_step(model: str, mode: str, folder: Path) -> tuple[Step, Callable[[], float]]:
    """What takes one training step and returns its loss, and what gives the norm of all gradients after it."""
    import torch
    import torch._inductor.compile_fx  # brings in Dynamo, too: in memory before the first step, in every process
    from training import contender, step_of

    import fastblocks

    saved = torch.load(folder / "problem.pt", weights_only=True)
    if mode.startswith("fastblocks"):
        fastblocks.use_backend("numba" if mode == "fastblocks_numba" else "native")
        mode = "fastblocks"
    network, run, images = contender(model, mode, saved["state"], saved["images"])

    def norm() -> float:
        return math.hypot(*(p.grad.norm().item() for p in network.parameters() if p.grad is not None))

    return step_of(network, run, images, saved["target"]), norm


def timed(step: Step, steps: int) -> dict[str, float]:
    """Milliseconds and page faults a step, after a step that does not count."""
    step()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    for _ in range(steps):
        step()
    milliseconds = (time.perf_counter() - start) * 1e3
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return {"ms": milliseconds / steps, "faults": faults / steps}


def serve(model: str, mode: str, folder: Path, threads: int) -> None:
    """Answer "first" with the first step's loss and norm, and a number with the time of so many steps."""
    import torch

    torch.set_num_threads(threads)
    step, norm = make_step(model, mode, folder)
    reply(ready=True)
    for line in sys.stdin:
        first = line.strip() == "first"
        facts = {"loss": step().item(), "norm": norm()} if first else timed(step, int(line))
        time.sleep(REST)
        reply(**facts)


# ---------------------------------------------------------------------------------------------------------- the parent


def prepare(model: str, batch: int, resolution: int, folder: Path) -> dict[str, float]:
    """Write weights and batch to the folder; the first step's loss and norm in plain torch."""
    import torch
    from training import batch_of, fresh_state

    images, target = batch_of(batch, resolution)
    problem = {"state": fresh_state(model), "images": images, "target": target}
    torch.save(problem, folder / "problem.pt")
    step, norm = make_step(model, "eager", folder)
    return {"loss": step().item(), "norm": norm()}


class Contender:
    """A mode: its process, and what was measured of it."""

    def __init__(self, mode: str, folder: Path, arguments: argparse.Namespace) -> None:
        self.mode = mode
        self.times: list[float] = []
        self.faults: list[float] = []
        self.peak: int | None = None
        tuned = mode == "fastblocks_tuned" or (arguments.malloc_tuned and mode != "fastblocks")
        options = {"--model": arguments.model, "--serve": mode, "--folder": folder, "--threads": arguments.threads}
        command = [sys.executable, __file__, *(str(part) for option in options.items() for part in option)]
        more = {"TORCHINDUCTOR_COMPILE_THREADS": "1", **(KEEP_MEMORY if tuned else {})}
        self.peer = Peer(mode, command, environment(arguments.threads, **more))
        self.peer.answer()
        self.before = resident(self.peer.pid)

    def differs(self, expected: dict[str, float]) -> str | None:
        """Take the first step: what is not as expected about it, if anything."""
        found = self.peer.ask("first")
        for key, value in expected.items():
            if not abs(found[key] - value) <= TOLERANCES[key] * abs(value):
                return f"{self.mode}: the first step's {key} is {found[key]:.6g}, plain torch's {value:.6g}"
        return None

    def take_turn(self, steps: int) -> None:
        facts = self.peer.ask(steps)
        self.times.append(facts["ms"])
        self.faults.append(facts["faults"])

    def look_at_memory(self, steps: int) -> None:
        looking = sampler(self.peer.pid)
        self.peer.ask(steps)
        self.peak = looking.ask("stop")["peak"] - self.before
        looking.close()


def start(modes: Sequence[str], folder: Path, expected: dict[str, float], arguments: Any) -> list[Contender]:
    """The modes that run, warmed up. A mode that fails is left out; one that computes something else ends the run."""
    contenders = []
    for mode in modes:
        try:
            contender = Contender(mode, folder, arguments)
            difference = contender.differs(expected)
            if difference is None:
                contender.peer.ask(WARM_UP)
        except RuntimeError as failure:
            print(f"{mode}: left out: {failure}")
            continue
        if difference is not None:
            sys.exit(difference)
        contenders.append(contender)
    return contenders


def ratio(mine: Sequence[float], other: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round.

    >>> ratio([1.0, 2.0, 9.0], [2.0, 4.0, 4.0])
    0.5
    """
    return statistics.median(a / b for a, b in zip(mine, other, strict=True))


def results(contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """One row a mode."""
    torch_modes = [c for c in contenders if not c.mode.startswith("fastblocks")]
    best = min(torch_modes, key=lambda c: statistics.median(c.times), default=None)
    last = next((c for c in contenders if c.mode == "channels_last"), None)
    rows = []
    for c in contenders:
        row: dict[str, Any] = {"mode": c.mode, "ms": statistics.median(c.times), "times": c.times}
        row |= {"of_best_torch": ratio(c.times, best.times) if best else None, "best_torch": c is best}
        row |= {"faults": statistics.median(c.faults)}
        if c.peak is not None:
            row |= {
                "peak_mb": c.peak / 1e6,
                "peak_of_channels_last": c.peak / last.peak if last and last.peak else None,
            }
        rows.append(row)
    return rows


def print_rows(rows: Sequence[dict[str, Any]], setting: dict[str, Any]) -> None:
    from training import slim_table, wide_console

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    console = wide_console()
    size = f"batch {setting['batch']}, {setting['resolution']}x{setting['resolution']}, float32"
    rounds, steps = counted(setting["rounds"], "round"), counted(setting["steps"], "step")
    how = f"{counted(setting['threads'], 'thread')}, {rounds} of {steps}"
    console.print(f"[bold]{setting['model']}, a training step[/], {size}, {how}", soft_wrap=True)
    memory = any("peak_mb" in row for row in rows)
    headings = ("ms", "lowest", "highest", "of best torch", "page faults")
    table = slim_table("", *headings, *("peak MB", "of channels_last") * memory)
    for row in rows:
        cells = [number(value, 1) for value in (row["ms"], min(row["times"]), max(row["times"]))]
        cells += [number(row["of_best_torch"], 3), number(row["faults"], 0)]
        if memory:
            cells += [number(row["peak_mb"], 0), number(row["peak_of_channels_last"], 2)]
        style = "bold green" if row["mode"].startswith("fastblocks") else ""
        table.add_row(LABELS[row["mode"]] + " (best)" * row["best_torch"], *cells, style=style)
    console.print(table)
    kept = "torch's processes: glibc keeps memory; " if setting["malloc_tuned"] else ""
    facts = setting["facts"]
    console.print(f"[dim]{kept}torch {torch_version(facts)}, {facts['cpu']}[/]", soft_wrap=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenet_v2", help="a name of fastblocks.models.list()")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of one turn that count")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--malloc-tuned", action="store_true", help="torch's processes keep their memory")
    parser.add_argument("--memory", action="store_true", help="also the most memory that a step has in use")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to this file")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    modes = list(arguments.modes)
    if arguments.malloc_tuned and "fastblocks" in modes:
        modes.append("fastblocks_tuned")
    with tempfile.TemporaryDirectory() as folder:
        expected = prepare(arguments.model, arguments.batch, arguments.resolution, Path(folder))
        contenders = start(modes, Path(folder), expected, arguments)
    for _ in range(arguments.rounds):
        for contender in contenders:
            contender.take_turn(arguments.steps)
    for contender in contenders if arguments.memory else ():
        contender.look_at_memory(arguments.steps)
    return results(contenders)


def main() -> None:
    arguments = parse()
    if arguments.serve:
        serve(arguments.model, arguments.serve, arguments.folder, arguments.threads)
        return
    from fastblocks.bench.machine import facts

    keys = ("model", "batch", "resolution", "threads", "rounds", "steps", "malloc_tuned")
    setting = {**{key: getattr(arguments, key) for key in keys}, "facts": facts()}
    rows = measure(arguments)
    print_rows(rows, setting)
    if arguments.json:
        arguments.json.write_text(json.dumps({**setting, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
