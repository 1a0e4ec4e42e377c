"""What a user would run a network with instead, each in a process of its own, and who is faster."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ENGINES", "PEERS", "TORCH", "Peer"]


class Peer(NamedTuple):
    """One contender.

    `modules` are what Python must be able to import, `packages` what pip installs for it, `home` the virtual
    environment that `environments.set_up` makes where it is not installed beside fastblocks.
    """

    name: str
    title: str
    modules: tuple[str, ...]
    packages: tuple[str, ...]
    home: str
    reads: str
    """The file that it starts from, beside input and expected output: weights, onnx or torchscript."""


def _torch(name: str, title: str) -> Peer:
    return Peer(name, title, ("torch",), ("torch",), "", "weights")


PEERS = {
    peer.name: peer
    for peer in (
        _torch("fastblocks", "fastblocks"),
        _torch("eager", "torch eager"),
        _torch("channels_last", "torch eager, channels_last"),
        _torch("compile", "torch.compile, freezing"),
        _torch("jit", "torch.jit, optimize_for_inference"),
        Peer("onnxruntime", "ONNX Runtime", ("onnxruntime",), ("onnxruntime",), "engines", "onnx"),
        Peer("openvino", "OpenVINO", ("openvino",), ("openvino",), "engines", "onnx"),
        Peer("ncnn", "ncnn", ("ncnn", "pnnx"), ("ncnn", "pnnx"), "engines", "torchscript"),
        Peer("mnn", "MNN", ("MNN",), ("MNN",), "engines", "onnx"),
        Peer(
            "litert",
            "LiteRT (XNNPACK)",
            ("ai_edge_litert", "litert_torch"),
            ("ai-edge-litert", "litert-torch"),
            "litert",
            "weights",
        ),
        Peer("executorch", "ExecuTorch (XNNPACK)", ("executorch",), ("executorch",), "executorch", "weights"),
    )
}
"""All contenders by name, in the order in which they take their turns."""

TORCH = ("eager", "channels_last", "compile", "jit")
ENGINES = tuple(name for name in PEERS if name not in TORCH and name != "fastblocks")
