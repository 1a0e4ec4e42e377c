"""`fastblocks bench`: who is measured, who is left out and why, and what is written."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import fastblocks
from fastblocks.bench import files, machine, words
from fastblocks.bench.errors import BenchError
from fastblocks.bench.peers import ENGINES, PEERS, TORCH, contest, show
from fastblocks.bench.peers.contest import Contest, hold
from fastblocks.bench.peers.problem import write_problem
from fastblocks.bench.process import Peer
from fastblocks.cli.app import run

pytest.importorskip("matplotlib")

FAKE = """
import argparse, json, sys
from math import nan
parser = argparse.ArgumentParser()
for name in ("--peer", "--folder", "--threads", "--stock"):
    parser.add_argument(name)
peer = parser.parse_args().peer

def say(turn, **facts):
    print(json.dumps({} if {odd}.get(peer) == turn else facts), flush=True)

print("a library says hello")
say(0, version="1.0", error={errors}.get(peer, 0.0))
for number, line in enumerate(sys.stdin):
    if peer in {crash} and number == 1:
        sys.exit("out of luck")
    say(number + 1, milliseconds={times}.get(peer, [3.0])[number % len({times}.get(peer, [3.0]))])
"""


@pytest.fixture
def fake_workers(tmp_path, monkeypatch):
    """Contenders that answer what the test says, by peer: times in turn, errors, who crashes in round two.

    `odd` has the number of an empty answer: 0 is the first one, which tells version and error.
    """

    def install(times, errors=None, crash=(), odd=None):
        file = tmp_path / "worker.py"
        text = FAKE
        for name, value in {"times": times, "errors": errors or {}, "crash": tuple(crash), "odd": odd or {}}.items():
            text = text.replace("{" + name + "}", repr(value))
        file.write_text(text)
        monkeypatch.setattr(contest.worker, "__file__", str(file))
        monkeypatch.setattr(contest, "python_of", lambda peer: Path(sys.executable))
        monkeypatch.setattr(contest, "limits", lambda: machine.Limits(100.0, 10.0, "test"))
        monkeypatch.setattr(contest, "write_problem", lambda *args: {})

    return install


@pytest.fixture
def one_result(fake_workers):
    fake_workers({"fastblocks": [2.0, 1.0, 3.0], "onnxruntime": [4.0, 1.0, 4.0], "openvino": [3.0, 2.0, 6.0]})
    return hold(Contest("mobilenet_v2", 2, 1, 3, 0.0, ("fastblocks", "eager", "onnxruntime", "openvino")))


def test_every_peer_of_the_users_choice_is_there():
    assert set(PEERS) == {"fastblocks", *TORCH, *ENGINES}
    expected = {"onnxruntime", "openvino", "ncnn", "mnn", "litert", "executorch"}
    assert set(ENGINES) == expected


def test_medians_and_ratios(one_result):
    rows = {row["name"]: row for row in one_result["rows"]}
    assert rows["fastblocks"]["milliseconds"] == 2.0
    assert rows["fastblocks"]["fastblocks_takes"] is None
    # round by round: 2/4, 1/1, 3/4
    assert rows["onnxruntime"]["fastblocks_takes"] == 0.75
    # the best of both engines in each round: 3, 1, 4
    assert one_result["fastblocks_takes_of_best_engine"] == 0.75
    # two images of 300,774,272 multiply-adds in 2 ms, of 100 GFLOP/s
    assert rows["fastblocks"]["share_of_peak"] == pytest.approx(2 * 2 * 300_774_272 / 2e-3 / 100e9)
    assert (one_result["multiply_adds"], one_result["parameters"]) == (300_774_272, 3_504_872)


def test_who_crashes_disagrees_or_is_missing_harms_nobody_else(fake_workers, monkeypatch):
    fake_workers({"fastblocks": [1.0]}, errors={"openvino": 0.5, "ncnn": math.nan}, crash=("onnxruntime",))
    present = contest.python_of
    monkeypatch.setattr(contest, "python_of", lambda peer: None if peer.name == "mnn" else present(peer))
    names = ("fastblocks", "eager", "onnxruntime", "openvino", "ncnn", "mnn")
    result = hold(Contest("mobilenet_v2", 1, 1, 3, 0.0, names))
    assert [row["name"] for row in result["rows"]] == ["fastblocks", "eager"]
    assert [len(row["rounds"]) for row in result["rows"]] == [3, 3]
    left_out = result["left_out"]
    assert left_out["onnxruntime"] == "it failed while it was timed: out of luck"
    assert left_out["openvino"] == "its output differs by 5.0e-01 of the largest logit, allowed is 1e-03"
    assert "differs by nan" in left_out["ncnn"]
    assert left_out["mnn"].startswith("not installed: pip install MNN")
    assert result["fastblocks_takes_of_best_engine"] is None


def test_who_answers_nothing_or_cannot_be_started_harms_nobody_else(fake_workers, monkeypatch, tmp_path):
    fake_workers({}, odd={"onnxruntime": 0, "openvino": 2})
    present = contest.python_of
    monkeypatch.setattr(contest, "python_of", lambda peer: tmp_path if peer.name == "mnn" else present(peer))
    result = hold(Contest("mobilenet_v2", 1, 1, 2, 0.0, ("fastblocks", "onnxruntime", "openvino", "mnn")))
    assert [(row["name"], len(row["rounds"])) for row in result["rows"]] == [("fastblocks", 2)]
    assert result["left_out"] == {
        "onnxruntime": "its answer has no 'version'",
        "mnn": f"[Errno 13] Permission denied: '{tmp_path}'",
        "openvino": "it failed while it was timed: its answer has no 'milliseconds'",
    }


def test_an_export_that_fails_leaves_its_readers_out(fake_workers, monkeypatch):
    fake_workers({})
    monkeypatch.setattr(contest, "write_problem", lambda *args: {"onnx": "export to onnx failed: no onnx"})
    result = hold(Contest("mobilenet_v2", 1, 1, 1, 0.0, ("fastblocks", "onnxruntime", "mnn", "ncnn")))
    assert result["left_out"] == dict.fromkeys(("onnxruntime", "mnn"), "export to onnx failed: no onnx")


def test_nobody_left_is_an_error(fake_workers):
    fake_workers({}, errors={"fastblocks": 1.0})
    with pytest.raises(BenchError, match=r"none of them could be timed \(fastblocks: its output differs"):
        hold(Contest("mobilenet_v2", 1, 1, 1, 0.0, ("fastblocks",)))


def test_real_contenders_compute_what_torch_computes(tmp_path):
    """Two real processes; the worker's own comparison must come out small, and not zero for other kernels."""
    result = hold(Contest("shufflenet_v2_x0_5", 2, 1, 1, 0.0, ("fastblocks", "channels_last")))
    assert result["left_out"] == {}
    rows = {row["name"]: row for row in result["rows"]}
    assert rows.keys() == {"fastblocks", "channels_last"}
    for row in rows.values():
        assert row["difference"] < 1e-5
        assert 0 < row["share_of_peak"] < 1
    assert rows["fastblocks"]["version"] == fastblocks.__version__


def test_the_problem_is_the_network(tmp_path):
    assert write_problem("mobilenet_v2", 2, {"torchscript"}, tmp_path) == {}
    import numpy as np

    x, expected = np.load(tmp_path / "x.npy"), np.load(tmp_path / "expected.npy")
    assert x.shape == (2, 3, 224, 224)
    network = fastblocks.models.mobilenet_v2().eval()
    network.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    with torch.no_grad():
        truth = network.double()(torch.from_numpy(x).double())
        scripted = torch.jit.load(tmp_path / "model.pt")(torch.from_numpy(x[:1]))
    assert np.abs(expected - truth.numpy()).max() < 1e-4 * truth.abs().max()
    assert (scripted - truth[:1]).abs().max() < 1e-4 * truth.abs().max()
    assert truth.std() > 1e-3 * truth.abs().max()  # no network whose channels have died


def test_a_silent_process_is_ended():
    peer = Peer("silent", [sys.executable, "-c", "import time; time.sleep(60)"])
    start = time.perf_counter()
    with pytest.raises(RuntimeError, match=r"no answer for 0.5 s"):
        peer.answer(patience=0.5)
    assert time.perf_counter() - start < 30
    peer.close()


def test_a_killed_process_is_named():
    code = "import os, sys; print('last words', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    peer = Peer("killed", [sys.executable, "-c", code])
    with pytest.raises(RuntimeError, match=r"^it ended with signal 9: last words$"):
        peer.answer()
    peer.close()


def test_limits_are_no_lower_than_what_torch_reaches():
    """torch.mm cannot be faster than a loop of nothing but multiply-adds; one thread, the best of several tries."""
    if "native" not in fastblocks.backend_info()["tiers"]:
        pytest.skip("without native kernels torch.mm is the limit")
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        limit = max(machine.limits().gflops for _ in range(2))
        a = torch.ones(768, 768)
        fastest = math.inf
        for _ in range(20):
            start = time.perf_counter()
            a @ a
            fastest = min(fastest, time.perf_counter() - start)
    finally:
        torch.set_num_threads(former)
    assert limit > 0.9 * 2 * 768**3 / fastest / 1e9


def test_files_are_named_and_whole(one_result, tmp_path):
    result = {"facts": machine.facts(), "command": "fastblocks bench", "contests": [one_result]}
    written = show.write_files(result, tmp_path / "new" / "folder")
    assert Counter(file.suffix for file in written) == {".json": 1, ".html": 1, ".png": 2}
    for file in written:
        assert "mobilenet_v2-batch2-1threads-" in file.name
        assert f"-torch{torch.__version__.partition('+')[0]}-{machine.facts()['date']}" in file.name
    assert json.loads(written[0].read_text())["contests"][0]["rows"][0]["milliseconds"] == 2.0
    page = written[1].read_text()
    assert "fastblocks takes 0.75 of the best engine" in page
    assert "<td>OpenVINO</td>" in page
    assert "http://" not in page and "https://" not in page
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written[2:])


def test_names_of_files_have_no_signs_that_mean_something_elsewhere():
    facts = {"cpu": "../Intel(R) Xeon(R) @ 2.20GHz", "torch": "2.14.1+cpu", "date": "/2026-01-02"}
    name = words.stem(["bench", "a b", ".hidden"], facts)
    assert name == "bench-a-b-hidden-intel-r-xeon-r-2.20ghz-torch2.14.1-2026-01-02"


def test_the_page_opens_without_an_error(one_result, tmp_path):
    from browser import console_errors

    written = show.write_files({"facts": machine.facts(), "command": "", "contests": [one_result]}, tmp_path)
    assert console_errors(written[1]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet"], "no network 'resnet', expected some of mobilenet_v1,"),
        (["--peers", "tvm"], "--peers: no contender 'tvm', expected some of fastblocks, eager,"),
        (["--batch", "0"], "Invalid value for '--batch'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path):
    assert run(["bench", *arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastblocks: ") and message in error and error.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_told_before_measuring(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    start = time.perf_counter()
    assert run(["bench", "--out", str(tmp_path / "file" / "results")]) == 2
    assert time.perf_counter() - start < 5
    error = capsys.readouterr().err
    assert (
        error.startswith("fastblocks: --out: expected a folder that can be written to, got") and error.count("\n") == 1
    )


@pytest.mark.parametrize("command", [["bench"], ["study"], ["profile", "mobilenet_v2", "--html", "x.html"]])
def test_a_missing_package_is_one_line(command, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(command) == 2
    error = capsys.readouterr().err
    assert "needs matplotlib: pip install 'fastblocks[bench]'" in error and error.count("\n") == 1


@pytest.fixture
def pipe(tmp_path):
    """What is in the file system and no file, as /dev/null is."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def test_a_page_replaces_no_device_and_needs_a_name(pipe, capsys):
    for file in ("", str(pipe)):
        assert run(["profile", "mobilenet_v2", "--html", file]) == 2
        error = capsys.readouterr().err
        assert error.startswith("fastblocks: --html") and error.count("\n") == 1
    assert pipe.is_fifo()


def test_a_device_is_no_file_to_replace(pipe):
    with pytest.raises(FileExistsError, match="no regular file"):
        files.replace_text(pipe, "x")
    assert pipe.is_fifo()


def test_what_cannot_be_written_is_told_with_its_option(pipe):
    with (
        pytest.raises(BenchError, match=r"^--out: cannot write to '.*/pipe': it is no regular file"),
        files.told_of("--out", pipe),
    ):
        files.replace_text(pipe, "x")


def test_the_command_prints_its_table(fake_workers, tmp_path, capsys, monkeypatch):
    fake_workers({"fastblocks": [2.0], "onnxruntime": [1.0]}, errors={"mnn": 1.0})
    monkeypatch.setenv("COLUMNS", "80")
    peers = "fastblocks,onnxruntime,mnn"
    assert run(["bench", "--peers", peers, "--threads", "1", "--rounds", "1", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:12])) <= 80
    ours, theirs = (next(line for line in lines if line.startswith(name)) for name in ("fastblocks", "ONNX"))
    assert ours.split()[2] == "2.00" and theirs.split()[3] == "1.00" and "2.000" in theirs
    assert any(line.startswith("mnn left out: its output differs") for line in lines)
    assert "ratio to the best engine, round by round: 2.000" in lines


def test_a_contest_that_fails_takes_no_other_with_it(fake_workers, tmp_path, capsys, monkeypatch):
    fake_workers({})

    def sometimes(which, tell):
        if which.batch == 2:
            raise BenchError("peers: none of them could be timed (fastblocks: out of luck)")
        return hold(which, tell)

    monkeypatch.setattr(contest, "hold", sometimes)
    arguments = ["bench", "--peers", "fastblocks", "--rounds", "1", "--threads", "1", "--out", str(tmp_path), "--json"]
    assert run([*arguments, "--batch", "1", "--batch", "2", "--batch", "3"]) == 2
    printed = capsys.readouterr()
    expected = "mobilenet_v2, batch 2: peers: none of them could be timed (fastblocks: out of luck)"
    assert printed.err == f"fastblocks: {expected}\n"
    (file,) = tmp_path.glob("bench-mobilenet_v2-batch1+3-*.json")
    assert json.loads(printed.out) == json.loads(file.read_text())
    assert [found["batch"] for found in json.loads(printed.out)["contests"]] == [1, 3]

    file.unlink()
    assert run([*arguments, "--batch", "2"]) == 2
    assert capsys.readouterr() == ("", f"fastblocks: {expected}\n")
    assert not [*tmp_path.glob("*.json")]
