"""A network in fastblocks beside what a user would pick instead, each in a process of its own.

Rounds are interleaved (A B C A B C ...), so a slow spell of the machine falls on everybody. What is quoted is the
median over rounds of the ratio within a round, with the median time of each row beside it. Outputs are compared before
anything is timed.

    python benchmarks/side_by_side.py --batch 1 --threads 2
    python benchmarks/side_by_side.py --model shufflenet_v2_x1_0 --batch 8
    python benchmarks/side_by_side.py --litert-python OTHER_ENVIRONMENT/bin/python   # ai-edge-litert needs its own
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

from fastblocks.bench.process import Peer, reply

PEERS = ("fastblocks", "eager", "channels_last", "compile", "onnxruntime", "openvino", "litert")


def export_network(name: str, folder: Path, batch: int) -> None:
    """Write the input, the expected output, the weights and the ONNX file that the peers read."""
    import numpy as np
    import torch

    import fastblocks
    from fastblocks.bench.stock import stock_model

    torch.manual_seed(0)
    model = fastblocks.models.create(name).eval()
    with torch.no_grad():
        for module in model.modules():  # statistics of a trained network: every channel alive, none at identity
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        x = torch.randn(batch, 3, 224, 224)
        plain = stock_model(model.state_dict())
        np.save(folder / "expected.npy", plain(x).numpy())
        torch.onnx.export(plain, (x,), str(folder / "model.onnx"), dynamo=False, input_names=["x"], opset_version=17)
    np.save(folder / "x.npy", x.numpy())
    torch.save(model.state_dict(), folder / "model.pth")


def plain_network(folder: Path):
    """The network in plain torch modules."""
    import torch

    from fastblocks.bench.stock import stock_model

    return stock_model(torch.load(folder / "model.pth", weights_only=True))


def make_runner(name: str, peer: str, folder: Path, threads: int):
    """Return a function without arguments that runs the network once and gives its output as an array."""
    import numpy as np

    x = np.load(folder / "x.npy")
    if peer == "onnxruntime":
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"x": x})[0]
    if peer == "openvino":
        import openvino as ov

        config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        compiled = ov.Core().compile_model(str(folder / "model.onnx"), "CPU", config)
        request = compiled.create_infer_request()
        tensor = ov.Tensor(x, shared_memory=True)
        request.set_input_tensor(tensor)

        def run_openvino(_keep=(x, tensor)):  # the request borrows the array's memory
            request.infer()
            return request.get_output_tensor().data

        return run_openvino
    if peer == "litert":
        import litert_torch
        import torch
        from ai_edge_litert.interpreter import Interpreter

        path = folder / "model.tflite"
        if not path.exists():
            litert_torch.convert(plain_network(folder), (torch.from_numpy(x),)).export(str(path))
        interpreter = Interpreter(str(path), num_threads=threads)
        interpreter.allocate_tensors()
        input_index = interpreter.get_input_details()[0]["index"]
        output_index = interpreter.get_output_details()[0]["index"]

        def run_litert():
            interpreter.set_tensor(input_index, x)
            interpreter.invoke()
            return interpreter.get_tensor(output_index)

        return run_litert
    return make_torch_runner(name, peer, folder, threads, x)


def make_torch_runner(name: str, peer: str, folder: Path, threads: int, x):
    import torch

    torch.set_num_threads(threads)
    image = torch.from_numpy(x)
    if peer == "fastblocks":
        import fastblocks

        model = fastblocks.models.create(name).eval()
        model.load_state_dict(torch.load(folder / "model.pth", weights_only=True))
    else:
        model = plain_network(folder)
    if peer in ("channels_last", "compile"):
        model = model.to(memory_format=torch.channels_last)
        image = image.contiguous(memory_format=torch.channels_last)
    if peer == "compile":
        import torch._inductor.config

        torch._inductor.config.freezing = True
        model = torch.compile(model)

    def run_torch():
        with torch.no_grad():
            return model(image).numpy()

    return run_torch


def serve(name: str, peer: str, folder: Path, threads: int) -> None:
    """The worker: answers one JSON line a request, until its input closes."""
    import numpy as np

    run = make_runner(name, peer, folder, threads)
    expected = np.load(folder / "expected.npy")
    for _ in range(5):
        output = run()
    error = float(np.abs(output - expected).max() / np.abs(expected).max())
    reply(error=error)
    for line in sys.stdin:
        seconds = float(line)
        times = []
        end = time.perf_counter() + seconds
        run()  # wakes the pool; not counted
        while len(times) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        reply(ms=statistics.median(times) * 1e3)


class Worker(Peer):
    """A peer, and its times."""

    def __init__(self, name: str, peer: str, python: str, folder: Path, threads: int):
        options = {"--model": name, "--serve": peer, "--folder": folder, "--threads": threads}
        command = [python, __file__, *(str(part) for option in options.items() for part in option)]
        super().__init__(peer, command, {**os.environ, "OMP_NUM_THREADS": str(threads)})
        self.times: list[float] = []

    def measure(self, seconds: float) -> float:
        self.times.append(self.ask(seconds)["ms"])
        return self.times[-1]


def start_workers(arguments, folder: Path) -> list[Worker]:
    workers = []
    for peer in arguments.peers:
        python = arguments.litert_python if peer == "litert" and arguments.litert_python else sys.executable
        worker = Worker(arguments.model, peer, python, folder, arguments.threads)
        try:
            error = worker.answer()["error"]
        except RuntimeError as failure:
            print(f"{peer:14s} left out: {failure}")
            continue
        if error > 1e-3:
            print(f"{peer:14s} left out: its output differs by {error:.1e} of the largest logit")
            continue
        workers.append(worker)
    return workers


def report(workers: list[Worker], arguments) -> None:
    mine = next((w for w in workers if w.name == "fastblocks"), None)
    outside = [w for w in workers if w.name in ("onnxruntime", "openvino", "litert")]
    rounds = range(len(workers[0].times))
    setting = f"batch {arguments.batch}, {arguments.threads} threads, {len(rounds)} rounds, {platform.machine()}"
    print(f"{arguments.model}, {setting}")
    for worker in workers:
        line = f"{worker.name:14s} {statistics.median(worker.times):8.2f} ms  (best {min(worker.times):.2f})"
        if mine and worker is not mine:
            line += (
                f"   fastblocks takes {statistics.median(mine.times[r] / worker.times[r] for r in rounds):.3f} of it"
            )
        print(line)
    if mine and outside:
        best = statistics.median(mine.times[r] / min(w.times[r] for w in outside) for r in rounds)
        print(f"fastblocks against the best of {', '.join(w.name for w in outside)}, round by round: {best:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenet_v2", help="a name of fastblocks.models.list()")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of one turn of one peer")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--litert-python", help="the Python that has ai-edge-litert, litert-torch and torch")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.model, arguments.serve, arguments.folder, arguments.threads)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export_network(arguments.model, folder, arguments.batch)
        workers = start_workers(arguments, folder)
        for _ in range(arguments.rounds):
            for worker in workers:
                worker.measure(arguments.seconds)
        report(workers, arguments)
        for worker in workers:
            worker.close()


if __name__ == "__main__":
    main()
