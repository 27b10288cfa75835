"""The commands of README and docs, page by page in a reader's order, on small data.

Those of `RUN` run, with what makes them small added at their end. The training commands of configs
other than the demo's want COCO and GPUs: they are parsed, and their configs built (tests/configs
takes a step with each).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import cv2
import pytest
import timm
import torch
from detectron2.config import LazyConfig
from docs_commands import DOCUMENTS, ROOT, Command, commands_of
from publishers import meta_dinov3

from projects.benchmark.gpu import TINY
from rope_vit_det.backbone import build_net
from rope_vit_det.engine.command_line import add_own_data_options, argument_parser
from rope_vit_det.engine.setup import check_settings, load_config

DEMO_SIZE = (
    "SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 SOLVER.WARMUP_ITERS 1 TEST.EVAL_PERIOD 0 "
    "INPUT.MIN_SIZE_TRAIN '(64,)' INPUT.MIN_SIZE_TEST 64"
)
# What starts a command that runs -> what is added to it.
RUN = {
    "python tools/train_net.py --config-file configs/demo.yaml": DEMO_SIZE,
    "rope-vit-det-train --config-file": f"OUTPUT_DIR output/installed {DEMO_SIZE}",
    "python tools/predict.py": "--confidence-threshold 0.01",
    "python tools/report.py": "",
    "python tools/visualize_data.py": "",
    "python tools/visualize_results.py": "",
    "python tools/export_model.py": "",
    "python tools/analyze_model.py": "",
    "python tools/classify.py": "",
    "python tools/convert_weights.py": "",
    "python tools/convert_to_coco.py": "",
    "python tools/install_detectron2.py": "",
    "python docs/networks_table.py": "",
    "python tools/slice_coco.py": "",
    "rope-vit-det-install-detectron2": "",
    "python tools/high_resolution_study.py": "--fine-tuning-iterations 1 --scales 1 1.5 -- "
    "SOLVER.MAX_ITER 1 SOLVER.WARMUP_ITERS 0",
    "python tools/benchmark.py --exported": "--networks rope_vit_reg4_demo16 --grids 4x4 "
    "--repeats 1",
    "python tools/benchmark.py --modes step": f"--sizes 64x96 --batch-size 1 --repeats 1 "
    f"--networks windowed --opts {' '.join(TINY)}",
    "python tools/benchmark.py": "--variant rope_vit_reg1_t14 --grids 4x4 --repeats 1",
    "python tools/benchmark_memory.py networks": "--variant rope_vit_reg1_t14 --grid 4x4",
    "python tools/benchmark_memory.py recipe": "MODEL.ROPE_VIT.NAME rope_vit_reg4_demo16 "
    "MODEL.WEIGHTS '' --image-size 64x64 --switches float32",
    "python examples/": "",
    "python -c": "",
}
BUILT = (
    "python tools/train_net.py",
    "python tools/lazyconfig_train_net.py",
    "torchrun ",
    "sbatch ",
)
# What stands for something of the reader's own.
FILLED = {
    "C": "configs/demo.yaml",
    "N": "2",
    "R": "1",
    "HOST": "a",
    "$B": "configs/backbones/rope_vit_reg4_b14.yaml",
}
# What starts a command that does neither -> where it is run instead.
ELSEWHERE = {
    "make demo": "by hand; its parts in tests/e2e",
    "make test": "this",
    "make gpu": "tests/projects/test_gpu.py",
    "python tools/aerial_trees.py": "tests/projects/test_aerial_trees.py",
    "python -m projects.versus_vitdet": "tests/projects/test_versus_vitdet.py",
    "pip install -e .": "tests/test_setup.py",
    "pip install .": "tests/test_installed.py",
    "export ": "a setting",
    "B=": "a variable of the commands below it",
}
ENTRIES = [(document, command) for document in DOCUMENTS for command in commands_of(document)]


def is_run(command: Command) -> bool:
    return command.text.startswith(tuple(RUN))


def is_built(command: Command) -> bool:
    return command.text.startswith(BUILT) and not is_run(command)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_every_command_is_tried_here_or_elsewhere(document):
    for command in commands_of(document):
        assert is_run(command) or is_built(command) or command.text.startswith(tuple(ELSEWHERE)), (
            command.text
        )


@pytest.mark.parametrize(
    "command", [pytest.param(c, id=f"{d.stem}: {c.text[:90]}") for d, c in ENTRIES if is_built(c)]
)
def test_commands_for_gpus_parse_and_their_configs_build(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = re.sub(r"[\\$\w]+", lambda word: FILLED.get(word[0], word[0]), command.text)
    # sbatch and torchrun come before it
    tool, arguments = re.search(r"(tools/\w+\.(?:py|sh))(.*)$", text).groups()
    parser = add_own_data_options(argument_parser())
    args = parser.parse_args(shlex.split(arguments))
    if tool.endswith("lazyconfig_train_net.py"):
        (file,) = args.config_file
        cfg = LazyConfig.apply_overrides(LazyConfig.load(file), args.opts)
        assert cfg.model.backbone and cfg.dataloader.train
    else:
        cfg = load_config(args)
        check_settings(cfg, eval_only=args.eval_only)
        assert "rope_vit" in cfg.MODEL.BACKBONE.NAME


@pytest.fixture(scope="session")
def workplace(tmp_path_factory, small_demo_dataset):
    """What a reader has who ran `make demo`, and brought photos, labels and weights."""
    folder = tmp_path_factory.mktemp("reader") / "rope-vit-det"
    folder.mkdir()
    for name in ("tools", "configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(small_demo_dataset, folder / "datasets" / small_demo_dataset.name)
    answer = run(Command("python tools/train_net.py --config-file configs/demo.yaml"), folder)
    assert answer.returncode == 0, answer.stderr[-3000:]
    bring_images(folder, small_demo_dataset)
    bring_labels(folder, small_demo_dataset)
    bring_diverged_batch(folder)
    return folder


@pytest.fixture
def weights(birder_file):
    path, _ = birder_file("rope_vit_reg4_b14", tag="birds")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "document",
    [d for d in DOCUMENTS if any(map(is_run, commands_of(d)))],
    ids=lambda path: path.stem,
)
def test_the_commands_of_a_page_run_in_its_order(document, workplace, tmp_path, weights):
    folder = tmp_path / "rope-vit-det"
    shutil.copytree(workplace, folder, symlinks=True)
    shutil.copy(weights, folder)
    bring_detector(folder / "output", weights)
    if document.stem == "networks":
        state = timm.create_model("vit_base_patch16_dinov3").state_dict()
        torch.save(meta_dinov3(state), folder / "dinov3_vitb16.pth")
    for command in filter(is_run, commands_of(document)):
        answer = run(command, folder)
        said = answer.stdout + answer.stderr
        # The page shows a file that cannot be read, and the exit status that comes of it.
        expected = 1 if any("unreadable" in line for line in command.shown) else 0
        report = f"{command.text}\n{said[-4000:]}"
        assert answer.returncode == expected, report
        lines = set(map(_without_numbers, said.splitlines()))
        for line in command.shown:
            # The probabilities are those of other random weights.
            if not re.search(r"0\.\d{4}", line):
                assert _without_numbers(line) in lines, f"no line {line!r}: {report}"


def _without_numbers(line: str) -> str:
    """Without the bytes of an image, which is another one here."""
    return re.sub(r"\d+ bytes", "bytes", line)


def run(command: Command, folder: Path) -> subprocess.CompletedProcess:
    added = next(added for start, added in RUN.items() if command.text.startswith(start))
    bin_folder = Path(sys.executable).parent
    environment = {k: v for k, v in os.environ.items() if k != "DETECTRON2_DATASETS"}
    environment |= {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    text = command.text.replace("$PWD", str(folder))  # as a shell has it
    arguments = [*shlex.split(text), *shlex.split(added)]
    return subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )


def bring_images(folder: Path, dataset: Path) -> None:
    """photo.jpg, photos/ (one of them broken), large.png and clip.mp4."""
    images = sorted((dataset / "val").glob("*.jpg"))
    shutil.copy(images[0], folder / "photo.jpg")
    (folder / "photos" / "may").mkdir(parents=True)
    for name, path in zip(("a.jpg", "may/c.jpg"), images, strict=False):
        shutil.copy(path, folder / "photos" / name)
    picture = cv2.imread(str(images[2]))
    cv2.imwrite(str(folder / "photos" / "b.png"), picture)
    (folder / "photos" / "broken.jpg").write_bytes(images[1].read_bytes()[:-16])
    cv2.imwrite(str(folder / "large.png"), cv2.resize(picture, (600, 500)))
    writer = cv2.VideoWriter(str(folder / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, (96, 64))
    for _ in range(3):
        writer.write(cv2.resize(picture, (96, 64)))
    writer.release()


def bring_labels(folder: Path, dataset: Path) -> None:
    """COCO files with train/ and val/, and beside the images what YOLO and Pascal VOC want."""
    for split, yolo in (("train", "train"), ("val", "valid")):
        shutil.copy(dataset / "annotations" / f"instances_{split}.json", folder / f"{split}.json")
        shutil.copytree(dataset / split, folder / split)
        for name, labels, suffix, text in (
            (f"{yolo}/images", f"{yolo}/labels", ".txt", "0 0.5 0.5 0.2 0.2\n"),
            (f"{split}/JPEGImages", f"{split}/Annotations", ".xml", voc_label()),
        ):
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / labels).mkdir(parents=True)
            for image in (dataset / split).glob("*.jpg"):
                shutil.copy(image, folder / name)
                (folder / labels / image.name).with_suffix(suffix).write_text(text)
    (folder / "data.yaml").write_text("names: [bird]\n")


def voc_label() -> str:
    annotation = ElementTree.Element("annotation")
    each = ElementTree.SubElement(annotation, "object")
    ElementTree.SubElement(each, "name").text = "bird"
    box = ElementTree.SubElement(each, "bndbox")
    for key, value in (("xmin", 5), ("ymin", 5), ("xmax", 30), ("ymax", 40)):
        ElementTree.SubElement(box, key).text = str(value)
    return ElementTree.tostring(annotation, encoding="unicode")


def bring_diverged_batch(folder: Path) -> None:
    """What a run leaves whose loss is not finite; here for its learning rate."""
    steep = "SOLVER.BASE_LR 1e18 SOLVER.CLIP_GRADIENTS.ENABLED False OUTPUT_DIR output/steep"
    command = f"python tools/train_net.py --config-file configs/demo.yaml {steep}"
    answer = run(Command(command), folder)
    (dump,) = (folder / "output" / "steep").glob("diverged_*.pth")
    assert answer.returncode == 3, answer.stderr[-3000:]
    dump.rename(folder / "output" / "demo" / "diverged_0000123_0.pth")


def bring_detector(folder: Path, weights: Path) -> None:
    """model_final.pth of a detector on the card's network, and the config of its training."""
    cfg = load_config(argument_parser().parse_args(["--config-file", "Base-RoPE-ViT.yaml"]))
    state = torch.load(weights, weights_only=True)["state"]
    model = {f"backbone.net.{key}": state[key] for key in build_net(cfg).state_dict()}
    torch.save({"model": model}, folder / "model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
