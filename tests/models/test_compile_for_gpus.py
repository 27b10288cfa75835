"""COMPILE's graphs for a GPU, made without one: over a CUDA runtime whose calls do nothing.

As on a GPU, a CUDA graph cannot be captured where the host waits or copies from its memory.

What the kernels compute is for tests/gpu; that they can be generated and compiled, are fewer, and
that the host waits for none of them, is for here. On torch 2.11 this runtime met the failure that
one graph of all blocks had met on an H200.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

STAND_IN = Path(__file__).parents[1] / "support" / "cuda_stand_in.c"
START = """
import ctypes, json, sys, torch
from torch._dynamo.utils import counters
from rope_vit_det import create_model
from rope_vit_det.backbone import RoPEViTNeck, RoPEViTPyramid, create_backbone

names = ("launches", "waits", "captured")
counts = [ctypes.c_long.in_dll(ctypes.CDLL("libcuda.so.1"), x) for x in names]
torch.backends.cudnn.enabled = False
torch.backends.cuda.enable_cudnn_sdp(False)
found = {}
"""
TRAINING = """
for compiled in (False, True):
    windows = dict(window_size=4, global_blocks=[1])
    net = create_model("rope_vit_reg4_demo16", features_only=True, compile=compiled, **windows)
    net.cuda()
    for mode, (h, w) in (("training", (96, 128)), ("training", (96, 160)), ("inference", (80, 96))):
        net.train(mode == "training")
        for _ in range(2):  # the second time, all is compiled
            for count in counts:
                count.value = 0
            with torch.set_grad_enabled(net.training), torch.autocast("cuda", torch.bfloat16):
                y = net.detection_features(torch.empty(2, 3, h, w, device="cuda"))
            if net.training:
                y["neck"].float().sum().backward()
            found[f"{mode} {w} {compiled}"] = [count.value for count in counts[:2]]
found["graphs"] = counters["stats"]["unique_graphs"]
print(json.dumps(found))
"""
INFERENCE = """
net = create_backbone("rope_vit_reg4_demo16", window_size=4, global_blocks=[1], compile=True)
options = dict(in_feature="neck", out_channels=32, scale_factors=(2.0, 1.0), norm="LN")
pyramid = RoPEViTPyramid(net, **options)

class Waits(torch.nn.Module):
    def forward(self, x):
        return x + bool(x.sum())

for name, module in ("neck", RoPEViTNeck(net)), ("pyramid", pyramid), ("waits", RoPEViTNeck(net)):
    module.cuda().eval()
    if name == "waits":
        net.encoder.pre_block.append(Waits().eval())
    rows = found[name] = []
    for i, (h, w) in enumerate([(96, 128)] * 3 + [(64, 96)] * 3 + [(96, 128)]):
        for count in counts:
            count.value = 0
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            y = module(torch.empty(1, 3, h, w, device="cuda"))
            assert all(list(each.shape[:1]) == [1] for each in y.values())
        rows.append([count.value for count in counts])
# As before, after what failed.
torch.rand(2, device="cuda"), torch.cuda.empty_cache()
module.train()(torch.empty(1, 3, 64, 96, device="cuda"))["neck"].sum().backward()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def without_gpu(tmp_path_factory):
    """The environment of a process that takes this machine for one with a GPU."""
    found = importlib.util.find_spec("triton")
    headers = Path(torch.__file__).parents[1] / "nvidia" / "cu13" / "include"
    if torch.cuda.is_available() or found is None or not shutil.which("gcc"):
        pytest.skip("for machines without a GPU, with Triton and gcc")
    if not (headers / "driver_types.h").exists():
        pytest.skip(f"stands in for CUDA 13; this torch is built with {torch.version.cuda}")
    nvidia = Path(found.submodule_search_locations[0]) / "backends" / "nvidia"
    source = STAND_IN.read_text()
    # What else Triton's own driver links.
    linked = "".join(path.read_text() for path in nvidia.glob("driver.*"))
    names = set(re.findall(r"\bcu[A-Z]\w+", linked)) - set(re.findall(r"\bcu[A-Z]\w+", source))
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "all.c").write_text(
        source + "".join(f"DOES_NOTHING({name})\n" for name in sorted(names) if name[-2:] != "_t")
    )
    library = folder / "libcuda.so.1"
    include = ["-I", headers, "-I", nvidia / "include"]  # what CUDA's lack, Triton's have
    flags = ["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", *include]
    subprocess.run(["gcc", *flags, "-o", library, folder / "all.c"], check=True)
    more = {"LD_PRELOAD": library, "LD_LIBRARY_PATH": folder, "TRITON_LIBCUDA_PATH": folder}
    more |= {"TORCHINDUCTOR_CACHE_DIR": folder / "inductor", "TRITON_CACHE_DIR": folder / "triton"}
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "0", **{k: str(v) for k, v in more.items()}}


def _run(script, environment):
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", START + script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout.splitlines()[-1]), answer.stderr


@pytest.mark.slow
def test_graphs_for_gpus_are_compiled_and_launch_less(without_gpu):
    found, _ = _run(TRAINING, without_gpu)
    assert found.pop("graphs") == 6  # of each: with windows and without
    for key in ("training 128", "training 160", "inference 96"):
        (eager, waited), (compiled, waited_too) = (found[f"{key} {x}"] for x in (False, True))
        assert 0 < compiled < eager, (key, compiled, eager)
        assert waited == waited_too == 0, key


@pytest.mark.slow
def test_sizes_that_repeat_are_one_launch(without_gpu):
    found, printed = _run(INFERENCE, without_gpu)
    for name in ("neck", "pyramid"):
        rows = found[name]
        # The first time, the second (captured), the third (replayed); then again.
        for first, second, third in (rows[:3], rows[3:6]):
            assert first[0] > 20 and first[2] == 0
            assert second[2] > 20 and second[0] > 1
            assert third == [1, 0, 0]
        assert rows[6] == [1, 0, 0]
    assert all(launches > 20 for launches, _, _ in found["waits"])
    assert printed.count("goes on without CUDA graphs") == 1, printed
