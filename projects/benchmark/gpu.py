"""`make gpu`: what there is to measure on a GPU, in parts of at most two minutes.

Each part is a process of its own and writes PART.json as it ends; then comes report.md, which is
printed as well. No network is needed. --dry-run does all of it on the CPU, at tiny sizes.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import torch
import torch._dynamo
from tabulate import tabulate

from projects.benchmark.bars import check_bars
from projects.benchmark.detectors import (
    DETECTORS,
    RECIPE,
    Detector,
    DetectorOptions,
    build_detector,
    format_detectors,
    run_detectors,
)
from projects.benchmark.measure import machine, seconds, today, training_call
from projects.benchmark.networks import CONTESTANTS, NetworkOptions
from projects.benchmark.report import format_bars, format_report
from projects.benchmark.run import BenchmarkOptions, run_benchmark
from rope_vit_det.data.demo import dataset as demo
from rope_vit_det.errors import InputError, input_errors_as_one_line

ROOT = Path(__file__).resolve().parents[2]
GPU_TESTS = ROOT / "tests" / "gpu"
LIMIT, PART_LIMIT = 300, 120  # seconds
NEEDED = {"training": 75, "demo": 50}  # of these, without which a part is not begun; others: 25
COCO_IMAGES = 90_000 * 16  # that the 1x recipe trains on
COCO_SIZES = ((480, 640), (427, 640), (640, 480), (640, 427), (375, 500), (640, 640))
TINY = [
    *("MODEL.ROPE_VIT.NAME", "rope_vit_reg1_t14", "MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "20", "MODEL.ROI_BOX_HEAD.CONV_DIM", "16"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"),
]
TINY_IMAGES = ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"]
Result = dict[str, Any]


class _Clock:
    """The time that a part has; see `run_parts`."""

    end = float("inf")

    def left(self, reserve: float) -> float:
        """Seconds until there are but so many for the rest."""
        return self.end - time.monotonic() - reserve


CLOCK = _Clock()


def compile_times(device: str, dry_run: bool) -> Result:
    """Seconds that COMPILE takes of the recipe's network, without caches of earlier runs."""
    size, second = ((64, 96), (64, 64)) if dry_run else ((1024, 1024), (800, 1216))
    others = [] if dry_run else [second, (1216, 800)]
    name = "rope_vit_reg1_t14" if dry_run else "rope_vit_reg4_b14"
    options = NetworkOptions(name, 16, 4 if dry_run else 16, compile=True)
    if dry_run:  # the graphs, without minutes of a C++ compiler
        torch.compile = partial(torch.compile, backend="aot_eager")
    model = CONTESTANTS["windowed"].build(options).to(device)
    measurements: list[Result] = []

    def measure(of: str, call: Callable[[], object]) -> None:
        first, again = (seconds(call, torch.device(device)) for _ in range(2))
        measurements.append({"mode": "compile", "of": of, "median_s": first - again})

    batch = (1 if dry_run else 8, 3)
    images = torch.randn(*batch, *size, device=device)
    model.net.compiled = False  # what loading CUDA's libraries takes
    training_call(model.train(), images, True)()
    model.net.compiled = True
    measure("training", training_call(model, images, True))
    model.eval()
    for each in (size, *others):
        image = torch.randn(1, 3, *each, device=device)

        @torch.inference_mode()
        def call(image: torch.Tensor = image) -> object:
            with torch.autocast(image.device.type, torch.bfloat16):
                return model(image)

        measure(f"inference, {each[0]}×{each[1]}", call)
    # What a training and its first evaluation wait for.
    both = sum(each["median_s"] for each in measurements[:2])
    measurements.append({"mode": "compile", "of": "all", "median_s": both})
    if CLOCK.left(reserve=45) > 0:  # sizes that vary, as the 1x recipe's, wait for this as well
        images = torch.randn(*batch, *second, device=device)
        measure("training, a second size", training_call(model.train(), images, True))
    return {"measurements": measurements}


def backbone(device: str, dry_run: bool) -> Result:
    """The networks beside each other, forward and with the backward pass."""
    small = {"grids": ((4, 6),), "variant": "rope_vit_reg1_t14", "window_size": 3, "repeats": 1}
    small |= {"batch_size": 1, "networks": ("global", "windowed", "birder"), "compiled": False}
    full = {"networks": tuple(n for n in CONTESTANTS if n != "windows-only"), "batch_size": 8}
    full |= {"compiled": True}
    options = BenchmarkOptions(
        precisions=("bf16",),
        modes=("forward", "training"),
        device=device,
        **(small if dry_run else full),
    )
    results = run_benchmark(options)
    return results | {"table": format_report(results | {"bars": []})}


def _detectors(device: str, dry_run: bool, **options: Any) -> Result:
    small: dict[str, Any] = {"sizes": ((64, 96),), "repeats": 1, "opts": TINY}
    small |= {"batch_sizes": [max(1, each // 4) for each in options["batch_sizes"]]}
    torch._dynamo.reset()  # a run has one batch size, for which COMPILE makes its graphs
    results = run_detectors(
        DetectorOptions(device=device, **(options | (small if dry_run else {})))
    )
    return results | {"table": format_detectors(results)}


def step(device: str, dry_run: bool) -> Result:
    """A training step beside the peers under Detectron2's heads and step."""
    three = [DETECTORS[0], *(each for each in DETECTORS if each[1] == "Detectron2")]
    both = _detectors(device, dry_run, detectors=three, modes=("step",), batch_sizes=(8,))
    # What each of eight GPUs gets in the recipe.
    alone = _detectors(device, dry_run, detectors=three[:1], modes=("step",), batch_sizes=(2,))
    lists = {key: both[key] + alone[key] for key in ("measurements", "failed")}
    return both | lists | {"table": format_detectors(both | lists)}


def inference(device: str, dry_run: bool) -> Result:
    """One image at a time, ours with windows and without, beside the peers."""
    options = {"detectors": DETECTORS[:4], "modes": ("predict",), "repeats": 20}
    options |= {"sizes": ((1024, 1024), (800, 1216)), "batch_sizes": (1,)}
    return _detectors(device, dry_run, **options)


def peers(device: str, dry_run: bool) -> Result:
    """A training step with and without windows, and of the peers under our heads and step."""
    options = {"detectors": [each for each in DETECTORS if each[1] == "recipe"]}
    return _detectors(device, dry_run, **options, modes=("step",), batch_sizes=(8,))


def training(device: str, dry_run: bool) -> Result:
    """tools/train_net.py: the one-GPU recipe on JPEGs of COCO's sizes."""
    with TemporaryDirectory() as folder:
        work = Path(folder)
        images = 8 if dry_run else 256
        train = _write_coco(work, "train", images, COCO_SIZES)
        val = _write_coco(work, "val", 4, COCO_SIZES)
        recipe = Path(RECIPE).with_name(f"{Path(RECIPE).stem}_1gpu.yaml")
        own = ["--train-json", *train[:1], "--train-images", *train[1:]]
        own += ["--val-json", *val[:1], "--val-images", *val[1:]]
        opts = ["MODEL.WEIGHTS", "", "SOLVER.STEPS", "()"]
        if dry_run:
            opts += [*TINY, *TINY_IMAGES, "SOLVER.ACCUMULATE", "2", "SOLVER.IMS_PER_BATCH", "2"]
            opts += ["SOLVER.REFERENCE_WORLD_SIZE", "0"]
        iterations = 6 if dry_run else 40  # the first three are not timed
        arguments = [*own, "--no-rehearsal"]
        coco = _train(work, recipe, "coco", iterations, device, arguments, opts)
        coco["of"] = "one GPU"
        coco["hours_of_coco_1x"] = COCO_IMAGES / coco["images_per_s"] / 3600
        return {"measurements": [coco]}


def train_demo(device: str, dry_run: bool) -> Result:
    """tools/train_net.py: the demo."""
    with TemporaryDirectory() as folder:
        work = Path(folder)
        splits, demo.SPLITS = demo.SPLITS, {"train": 8 if dry_run else 256, "val": 4}
        try:
            demo.generate_demo_dataset(work / "rope_vit_det_demo")
        finally:
            demo.SPLITS = splits
        opts = TINY_IMAGES if dry_run else []
        iterations = 6 if dry_run else 160
        drawn = _train(work, ROOT / "configs" / "demo.yaml", "demo", iterations, device, [], opts)
        return {"measurements": [drawn | {"of": "demo"}]}


def _train(
    work: Path,
    config: Path,
    output: str,
    iterations: int,
    device: str,
    arguments: Sequence[object],
    opts: Sequence[str],
) -> Result:
    """Runs the tool, at most as long; what it has logged by then is its measurement."""
    fixed = ["MODEL.DEVICE", device, "OUTPUT_DIR", output, "TEST.EVAL_PERIOD", "0"]
    fixed += ["SOLVER.MAX_ITER", iterations, "SOLVER.WARMUP_ITERS", 1]
    command = [ROOT / "tools" / "train_net.py", "--config-file", config, *arguments, *opts, *fixed]
    python = [sys.executable, "-W", "ignore"]
    # It leaves a checkpoint at its end, for which it gets some seconds more.
    status, printed = _run([*python, *command], CLOCK.left(reserve=20), work, _paths(work))
    rows = work / output / "metrics.json"
    lines = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    timed = [row for row in lines if "time" in row]
    taken = lines[-1].get("iteration", iterations) if timed else 0
    # A median of fewer has the compiler in it.
    if not timed or status not in (0, None) or (status is None and taken < 20):
        raise InputError(f"train_net.py of {config.name}, status {status}: {printed[-2000:]}")
    images = int(re.search(r"IMS_PER_BATCH: (\d+)", (work / output / "config.yaml").read_text())[1])
    last = timed[-1]  # medians; the first rows have the compiler in them
    return {
        "mode": "train_net",
        "median_s": last["time"],
        "data_s": last["data_time"],
        "images_per_s": images / last["time"],
        "iterations": taken,
        "finished": status == 0,
    }


def predict(device: str, dry_run: bool) -> Result:
    """tools/predict.py: JPEGs to COCO's JSON, with seven detections an image."""
    with TemporaryDirectory() as folder:
        work = Path(folder)
        size = (64, 96) if dry_run else (800, 1216)
        _, images = _write_coco(work, "images", 4 if dry_run else 96, [size])
        for file in [] if dry_run else [*images.iterdir()]:
            for i in range(9):  # so many that the first batch, which loads CUDA's libraries, is few
                os.link(file, file.with_stem(f"{file.stem}_{i}"))
        opts = [*TINY, *TINY_IMAGES] if dry_run else []
        each: Detector = build_detector("windowed", "recipe", DetectorOptions(opts=opts))
        (work / "config.yaml").write_text(each.cfg.dump())
        names = [f"class {i}" for i in range(each.cfg.MODEL.ROI_HEADS.NUM_CLASSES)]
        classes = {"names": names, "ids": list(range(1, len(names) + 1))}
        state = {"model": each.model.state_dict(), "classes": classes}
        torch.save(state, work / "model_final.pth")
        command = [ROOT / "tools" / "predict.py", "--config-file", work, "--input", images]
        command += ["--json", work / "found.json", "--batch-size", "2" if dry_run else "8"]
        command += ["--device", device, "--bf16", "--opts", "TEST.DETECTIONS_PER_IMAGE", "7"]
        python = [sys.executable, "-W", "ignore"]
        status, printed = _run([*python, *command], CLOCK.left(reserve=5), work, _paths(work))
        rates = re.search(r"([\d.]+) images/s with .*, ([\d.]+) images/s in the det", printed)
        if status != 0 or not rates:
            raise InputError(f"predict.py, status {status}: {printed[-2000:]}")
        found = len(json.loads((work / "found.json").read_text()))
    rate = {"images_per_s": float(rates[1]), "images_per_s_in_the_detector": float(rates[2])}
    return {"measurements": [{"mode": "predict_files", **rate, "detections": found}]}


def tests(file: str, device: str, dry_run: bool) -> Result:
    """A file of tests/gpu."""
    more = {"GPU_TESTS": "cpu"} if dry_run else {}
    pytest = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-n0", "-rfEs"]
    # pytest tells at a Ctrl-C how far it came, and ends what its tests have started.
    limit = CLOCK.left(reserve=20)
    status, printed = _run([*pytest, GPU_TESTS / file], limit, ROOT, more, stop=signal.SIGINT)
    print(printed)
    lines = [line for line in printed.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    if status is None:
        told.append(f"stopped after {limit:.0f} s")
    table = "\n".join([*told, lines[-1]])
    return {"status": 1 if status is None else status, "measurements": [], "table": table}


PARTS: dict[str, Callable[[str, bool], Result]] = {
    "compile": compile_times,
    "step": step,
    "backbone": backbone,
    "inference": inference,
    "predict": predict,
    "training": training,
    "demo": train_demo,
    "test-network": partial(tests, "test_network.py"),
    "test-detector": partial(tests, "test_detector.py"),
    "peers": peers,
}


def _write_coco(
    folder: Path, name: str, number: int, sizes: Sequence[tuple[int, int]]
) -> tuple[Path, Path]:
    """JPEGs with as many bytes a pixel as photographs, and COCO's file of seven objects in each."""
    rng = np.random.default_rng(len(name))
    (folder / name).mkdir()
    images, annotations = [], []
    for i in range(number):
        height, width = sizes[i % len(sizes)]
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / name / f"{i:05}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])
        image = {"id": i + 1, "file_name": f"{i:05}.jpg", "height": height, "width": width}
        images.append(image)
        for _ in range(7):
            w, h = rng.integers(16, min(height, width) // 2, 2).tolist()
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            angles = np.linspace(0, 2 * np.pi, 20, endpoint=False)
            outline = np.stack((x + w / 2 * (1 + np.cos(angles)), y + h / 2 * (1 + np.sin(angles))))
            about = {"id": len(annotations) + 1, "image_id": i + 1, "iscrowd": 0, "area": w * h}
            about |= {"category_id": int(rng.integers(1, 81)), "bbox": [x, y, w, h]}
            annotations.append(about | {"segmentation": [outline.T.flatten().round(1).tolist()]})
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
    file = folder / f"{name}.json"
    whole = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(whole))
    return file, folder / name


def _paths(work: Path) -> dict[str, str]:
    return {"DETECTRON2_DATASETS": str(work), "PYTHONPATH": _python_path()}


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def _run(
    command: Sequence[object],
    limit: float,
    folder: Path,
    more: dict[str, str],
    stop: signal.Signals = signal.SIGTERM,
) -> tuple[int | None, str]:
    """A command's status, None where the time was over, and what it printed."""
    process = subprocess.Popen(
        [str(each) for each in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=os.environ | more,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=None if limit == float("inf") else limit)
        return process.returncode, printed
    except subprocess.TimeoutExpired:
        process.send_signal(stop)  # a part ends what it has started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        return None, _kill(process)
    except BaseException:
        print(_kill(process))
        raise


def _kill(process: subprocess.Popen) -> str:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


def run_part(name: str, out: Path, device: str, dry_run: bool) -> None:
    """Runs a part in this process, and writes its JSON."""
    start = time.perf_counter()
    result = PARTS[name](device, dry_run)
    result |= {"machine": machine(torch.device(device)), "date": today()}
    result["part_s"] = time.perf_counter() - start
    new = out / f".{name}.json"
    new.write_text(json.dumps(result, indent=1) + "\n")
    new.rename(out / f"{name}.json")
    if status := result.get("status"):
        sys.exit(f"{result['table']}\nstatus {status}")


def run_parts(parts: Sequence[str], out: Path, device: str, dry_run: bool) -> int:
    """Runs parts, one after the other, and prints the report.

    Returns:
        The exit status: 0, or 1 where a part failed or had not the time.
    """
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    lines, wrong = [], False
    with TemporaryDirectory() as caches:
        # "compile" comes first, and compiles from nothing; those behind it need not.
        more = {"TORCHINDUCTOR_CACHE_DIR": caches, "PYTHONPATH": _python_path()}
        for name in sorted(parts, key=list(PARTS).index):
            (out / f"{name}.json").unlink(missing_ok=True)
            left = LIMIT - (time.perf_counter() - start)
            if left < NEEDED.get(name, 25) and not dry_run:
                lines.append(f'{name}: left out, {LIMIT} s are over: make gpu PARTS="{name}"')
                wrong = True
                continue
            limit = float("inf") if dry_run else min(PART_LIMIT, left)
            command = [sys.executable, "-W", "ignore", "-m", __spec__.name, "--parts", name]
            command += ["--out", out.resolve(), "--here", limit]
            command += ["--dry-run"] if dry_run else []
            begun = time.perf_counter()
            status, printed = _run(command, limit, ROOT, more)
            (out / f"{name}.txt").write_text(printed)
            taken = f"{time.perf_counter() - begun:.0f} s"
            failed = _read(out, name).get("failed", []) if status == 0 else []
            if status == 0:
                said = ", ".join(f"{each['network']} failed: {each['why']}" for each in failed)
                lines.append(f"{name}: {taken}{said and '; '}{said}")
                wrong |= bool(failed)
            else:
                what = "stopped" if status is None else f"failed with status {status}"
                last = (printed.strip().splitlines() or ["nothing printed"])[-1]
                lines.append(f"{name}: {what} after {taken}, see {out / name}.txt: {last}")
                wrong = True
            print(lines[-1], flush=True)
    report = format_parts(out, lines, device)
    (out / "report.md").write_text(report + "\n")
    print(f"\n{report}")
    return int(wrong)


def format_parts(out: Path, lines: Sequence[str], device: str) -> str:
    """All parts that lie in the folder, of this run or of those before, and the bars."""
    text, measurements = [*lines], []
    kind = f"{device} "
    for name in PARTS:
        result = _read(out, name)
        if not result or not result["machine"]["kind"].startswith(device):
            continue
        kind = result["machine"]["kind"]
        measurements += result["measurements"]
        text += ["", f"## {name}, {result['date']}, {result['machine']['device']}", ""]
        text.append(result.get("table") or _plain_table(result["measurements"]))
    # Those of GPUs, which on a CPU are not measured.
    kind = kind if kind.startswith("cuda") else "cuda"
    measured = measurements if device.startswith("cuda") else []
    return "\n".join([*text, "", format_bars(check_bars(measured, kind, all_of_them=True))])


def _read(out: Path, name: str) -> Result:
    file = out / f"{name}.json"
    result: Result = json.loads(file.read_text()) if file.exists() else {}
    return result


def _plain_table(measurements: Sequence[Result]) -> str:
    keys = dict.fromkeys(key for each in measurements for key in each)
    rows = [[each.get(key, "") for key in keys] for each in measurements]
    return tabulate(rows, headers=list(keys), tablefmt="github", floatfmt=".3g")


@input_errors_as_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--out", type=Path, help="default: output/gpu, with --dry-run output/gpu_dry_run")
    add("--dry-run", action="store_true", help="on the CPU, at tiny sizes")
    add("--here", type=float, help=argparse.SUPPRESS)  # seconds for a part in this process
    args = parser.parse_args()
    device = "cpu" if args.dry_run else "cuda"
    if args.here:
        CLOCK.end = time.monotonic() + args.here
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
        run_part(args.parts[0], args.out, device, args.dry_run)
        return
    if not args.dry_run and not torch.cuda.is_available():
        raise InputError("no GPU is visible here; --dry-run goes through all of it on the CPU")
    out = args.out or Path("output/gpu_dry_run" if args.dry_run else "output/gpu")
    sys.exit(run_parts(args.parts, out, device, args.dry_run))


if __name__ == "__main__":
    main()
