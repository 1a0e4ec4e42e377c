"""One contender at work. A program of its own: it runs in environments that have no fastblocks, so it imports none.

    python worker.py --peer NAME --folder DIR --threads N --stock FILE

The folder has the input ``x.npy`` (N, 3, H, W), the ``expected.npy`` logits, and what the peer starts from:
``weights.pth`` (with `FILE`, the module that builds the plain network), ``model.onnx`` or ``model.pt`` (TorchScript).
The program answers with one line of JSON: its version and how far its output lies from the expected one. Then it takes
lines with a number of seconds, and answers each with the median time of a call, in milliseconds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Runner = Callable[[], Any]
"""Runs the network once; its output is an array, or a list of arrays to be stacked (an image each)."""

WARM_UP = 5
LEAST_CALLS = 3  # in a turn
REST = 0.03  # seconds after a turn: threads that still spin would be counted to the next contender


def plain_network(stock: Path, folder: Path) -> Any:
    """The network in plain torch modules, with its weights."""
    import torch

    spec = importlib.util.spec_from_file_location("plain_networks", stock)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.stock_model(torch.load(folder / "weights.pth", weights_only=True))


def torch_mode(peer: str, folder: Path, threads: int, stock: Path) -> tuple[Runner, str]:
    """Torch as it comes, in channels_last, compiled or scripted; and fastblocks."""
    import torch

    torch.set_num_threads(threads)
    image = torch.from_numpy(np.load(folder / "x.npy"))
    if peer == "fastblocks":
        import fastblocks

        about = json.loads((folder / "about.json").read_text())
        model: Any = fastblocks.models.create(about["model"]).eval()
        model.load_state_dict(torch.load(folder / "weights.pth", weights_only=True))
    else:
        model = plain_network(stock, folder)
    if peer in ("channels_last", "compile"):
        model = model.to(memory_format=torch.channels_last)
        image = image.contiguous(memory_format=torch.channels_last)
    if peer == "compile":
        import torch._inductor.config

        torch._inductor.config.freezing = True
        model = torch.compile(model)
    if peer == "jit":
        with torch.no_grad():
            model = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(model, image)))

    def run() -> Any:
        with torch.no_grad():
            return model(image)

    return (lambda: run().numpy()), version("fastblocks" if peer == "fastblocks" else "torch")


def onnxruntime(peer: str, folder: Path, threads: int, stock: Path) -> tuple[Runner, str]:
    """ONNX Runtime's CPU provider, all graph optimisations on."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    x = np.load(folder / "x.npy")
    return lambda: session.run(None, {"x": x})[0], version("onnxruntime")


def openvino(peer: str, folder: Path, threads: int, stock: Path) -> tuple[Runner, str]:
    """OpenVINO's CPU plugin, tuned for latency, in float32."""
    import openvino as ov

    config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(str(folder / "model.onnx"), "CPU", config)
    request = compiled.create_infer_request()
    x = np.load(folder / "x.npy")
    tensor = ov.Tensor(x, shared_memory=True)
    request.set_input_tensor(tensor)

    def run(_keep: Any = (x, tensor)) -> Any:  # the request borrows the array's memory
        request.infer()
        return request.get_output_tensor().data

    return run, version("openvino")


def ncnn(peer: str, folder: Path, threads: int, stock: Path) -> tuple[Runner, str]:
    """Tencent's ncnn, from TorchScript by way of pnnx. It takes one image at a time."""
    import ncnn as engine
    import pnnx

    x = np.load(folder / "x.npy")
    shape = ",".join(map(str, (1, *x.shape[1:])))
    subprocess.run(
        [pnnx.EXEC_PATH, "model.pt", f"inputshape=[{shape}]", "fp16=0"],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    net = engine.Net()
    net.opt.num_threads = threads
    net.opt.use_vulkan_compute = False
    for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(net.opt, option, False)
    if net.load_param(str(folder / "model.ncnn.param")) or net.load_model(str(folder / "model.ncnn.bin")):
        raise RuntimeError("ncnn cannot read what pnnx wrote")
    images = [engine.Mat(image).clone() for image in x]

    def run() -> Any:
        outputs = []
        for image in images:
            extractor = net.create_extractor()
            extractor.input("in0", image)
            outputs.append(np.array(extractor.extract("out0")[1]))
        return outputs

    return run, version("ncnn")


def mnn(peer: str, folder: Path, threads: int, stock: Path) -> tuple[Runner, str]:
    """Alibaba's MNN on the CPU, in float32."""
    import MNN

    # Not by the command mnnconvert: it runs pip to install a logging package into whatever environment is active, and
    # reports each conversion to a server.
    convert = "import sys, MNN, _tools; _tools.mnnconvert(sys.argv)"
    options = ("-f", "ONNX", "--modelFile", "model.onnx", "--MNNModel", "model.mnn", "--bizCode", "bench")
    subprocess.run(
        [sys.executable, "-c", convert, *options],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    x = np.load(folder / "x.npy")
    interpreter = MNN.Interpreter(str(folder / "model.mnn"))
    session = interpreter.createSession({"backend": "CPU", "precision": "high", "numThread": threads})
    source = interpreter.getSessionInput(session)
    result = interpreter.getSessionOutput(session)
    planar = MNN.Tensor_DimensionType_Caffe
    image = MNN.Tensor(x.shape, MNN.Halide_Type_Float, x, planar)
    logits = MNN.Tensor(result.getShape(), MNN.Halide_Type_Float, np.zeros(result.getShape(), np.float32), planar)

    def run() -> Any:
        source.copyFrom(image)
        interpreter.runSession(session)
        result.copyToHostTensor(logits)
        return logits.getNumpyData()

    return run, version("MNN")


def litert(peer: str, folder: Path, threads: int, stock: Path) -> tuple[Runner, str]:
    """Google's LiteRT with its XNNPACK delegate, converted by litert-torch."""
    import litert_torch
    import torch
    from ai_edge_litert.interpreter import Interpreter

    x = np.load(folder / "x.npy")
    path = folder / "model.tflite"
    litert_torch.convert(plain_network(stock, folder), (torch.from_numpy(x),)).export(str(path))
    interpreter = Interpreter(str(path), num_threads=threads)
    interpreter.allocate_tensors()
    source = interpreter.get_input_details()[0]["index"]
    result = interpreter.get_output_details()[0]["index"]

    def run() -> Any:
        interpreter.set_tensor(source, x)
        interpreter.invoke()
        return interpreter.get_tensor(result)

    return run, version("ai-edge-litert")


def executorch(peer: str, folder: Path, threads: int, stock: Path) -> tuple[Runner, str]:
    """Meta's ExecuTorch with its XNNPACK delegate."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    image = torch.from_numpy(np.load(folder / "x.npy"))
    exported = torch.export.export(plain_network(stock, folder), (image,))
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    path = folder / "model.pte"
    path.write_bytes(lowered.buffer)
    portable_lib._unsafe_reset_threadpool(threads)
    method = Runtime.get().load_program(path).load_method("forward")
    return lambda: method.execute([image])[0].numpy(), version("executorch")


ENGINES = {
    function.__name__: function for function in (onnxruntime, openvino, ncnn, mnn, litert, executorch)
}  # the others are torch's modes


def reply(**facts: Any) -> None:
    """Answer with one line."""
    print(json.dumps(facts), flush=True)


def turn(run: Runner, seconds: float) -> list[float]:
    """Milliseconds of each call in a turn of about so many seconds."""
    times: list[float] = []
    run()  # wakes the threads; not counted
    end = time.perf_counter() + seconds
    while len(times) < LEAST_CALLS or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    """Prepare, report, then take turns until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--stock", type=Path, required=True)
    arguments = parser.parse_args()
    make = ENGINES.get(arguments.peer, torch_mode)
    run, its_version = make(arguments.peer, arguments.folder, arguments.threads, arguments.stock)
    expected = np.load(arguments.folder / "expected.npy")
    for _ in range(WARM_UP):
        output = np.asarray(run()).reshape(expected.shape)
    error = float(np.abs(output - expected).max() / np.abs(expected).max())
    reply(version=its_version, error=error)
    for line in sys.stdin:
        times = turn(run, float(line))
        time.sleep(REST)
        reply(milliseconds=statistics.median(times), calls=len(times))


if __name__ == "__main__":
    main()
