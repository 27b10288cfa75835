"""The report: complete, from a folder alone, and opened in a browser."""

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rope_vit_det.errors import InputError
from rope_vit_det.evaluation.precision import METRICS, class_precisions
from rope_vit_det.evaluation.results import read_results, read_truth
from rope_vit_det.report import write_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PHONE = 390  # CSS pixels
ADDRESSES = ("src", "href", "xlink:href", "srcset", "data")
# What the page says of itself once it is loaded.
PROBE = """onload = () => {
  const view = document.getElementById("phone").contentWindow, page = view.document;
  const images = [...page.images];
  document.title = JSON.stringify([
    page.documentElement.scrollWidth,
    images.length,
    images.filter(each => each.complete && each.naturalWidth).length,
    view.performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length,
    page.querySelectorAll("svg").length,
  ]);
}"""


@pytest.fixture(scope="module")
def run_folder(trained_folder, known_results, tmp_path_factory) -> Path:
    """What a training with an evaluation leaves."""
    folder = tmp_path_factory.mktemp("runs") / "my <run>"
    shutil.copytree(trained_folder, folder)
    config = (folder / "config.yaml").read_text()
    config = config.replace("VAL_JSON: ''", f"VAL_JSON: {known_results.json_file}")
    config = config.replace("VAL_IMAGES: ''", f"VAL_IMAGES: {known_results.images}")
    config = re.sub(r"TEST:\n  - rope_vit_det_demo_val", "TEST:\n  - own_val", config)
    (folder / "config.yaml").write_text(config)
    rows = [
        {"iteration": i, "total_loss": 2 / (i + 1), "time": 0.25, "data_time": 0.05}
        for i in range(5)
    ]
    rows.append({"iteration": 4, "bbox/AP": 40.0, "segm/AP": 36.0})
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    record = {
        "time": "2026-01-01",
        "seed": 7,
        "git_revision": "abc",
        "python": "3.11",
        "versions": {"torch": "9.9"},
    }
    later = record | {"time": "2027-01-01", "seed": 8, "eval_only": True}
    (folder / "runs.json").write_text("".join(json.dumps(each) + "\n" for each in (record, later)))
    (folder / "log.txt").write_text(
        "Total inference pure compute time: 0:00:06 (0.087170 s / iter per device, on 1 devices)\n"
        "Peak memory: 1234 MiB\n"
    )
    return folder


class Page(HTMLParser):
    """Addresses, tables, text and images of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses, self.rows, self.text, self.tags = [], [], [], []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.addresses += [value for key, value in attributes if key in ADDRESSES]
        if tag == "tr":
            self.rows.append([])
        self.in_cell = tag == "td"
        if self.in_cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.in_cell = False

    def handle_data(self, data):
        self.text.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data


def test_the_report_holds_everything_and_fetches_nothing(run_folder, known_results):
    file = write_report(run_folder)
    assert file == run_folder / "report.html"
    text = file.read_text()
    page = Page(text)
    assert all(each.startswith(("data:", "#")) for each in page.addresses)
    assert not re.search(r"url\((?!#)|@import|<script", text)
    assert (
        "meta",
        {"name": "viewport", "content": "width=device-width, initial-scale=1"},
    ) in page.tags
    words = " ".join(page.text)
    for wanted in (
        "my <run>",
        "5 of 900",
        "rope_vit_reg4_demo16",
        "torch 9.9",
        "abc",
        "0.250 s, 0.050 s",
        "0.087 s an image",
        "1234 MiB",
        "total loss",
        "Precision over recall",
        "IoU 0.75",
        "Confusion",
        "Worst held-out",
        "SOLVER:",
    ):
        assert wanted in words, wanted
    truth = read_truth(known_results.json_file)
    results, _ = read_results(known_results.results_file, truth)
    for task in ("bbox", "segm"):
        for each in class_precisions(truth, results, task):
            values = ["–" if np.isnan(v) else f"{v:.1f}" for v in map(each.values.get, METRICS)]
            assert [each.name, *values, str(each.num_objects)] in page.rows
    names = [a["alt"] for tag, a in page.tags if tag == "img"]
    assert sorted(names) == sorted(each["file_name"] for each in truth.dataset["images"])


@pytest.mark.skipif(CHROMIUM is None, reason="no browser here: apt-get install chromium")
def test_a_browser_shows_it_on_a_phone_without_horizontal_scrolling(run_folder, tmp_path):
    report = write_report(run_folder).read_text()
    frame = tmp_path / "phone.html"
    # In a frame: a headless window has a least width.
    frame.write_text(
        f'<body style="margin:0"><iframe id="phone" style="border:0;width:{PHONE}px;height:4000px"'
        f' srcdoc="{html.escape(report)}"></iframe><script>{PROBE}</script>'
    )
    picture = tmp_path / "phone.png"
    answer = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=800,4000",
            f"--screenshot={picture}",
            "--dump-dom",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    title = re.search(r"<title>(.*?)</title>", answer.stdout)
    assert title, answer.stderr[-1000:]
    width, images, shown, fetched, charts = json.loads(html.unescape(title[1]))
    assert width <= PHONE
    assert images == shown == 4 and fetched == 0
    assert charts == 5  # losses, AP, two of precision over recall, confusion
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    page, beside = pixels[:, :PHONE], pixels[:, PHONE:]
    assert (beside == 255).all()
    inked = (page != 255).any(axis=(1, 2))
    assert inked[:500].mean() > 0.3 and page.std() > 10


def test_a_run_without_evaluation_has_a_report_that_says_so(run_folder, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.yaml", "metrics.json"):
        shutil.copy(run_folder / name, folder)
    assert "There are no results" in write_report(folder).read_text()


def break_metrics(folder):
    (folder / "metrics.json").write_text("{")


def break_results(folder):
    (folder / "inference" / "coco_instances_results.json").write_text(
        '[{"image_id": 999, "category_id": 1, "score": 1, "bbox": [0, 0, 1, 1]}]'
    )


def move_images(folder):
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub("VAL_IMAGES: .*", "VAL_IMAGES: /nowhere", config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.yaml").unlink(), r"has no config\.yaml"),
        (lambda folder: (folder / "metrics.json").unlink(), r"metrics\.json: No such file"),
        (break_metrics, r"metrics\.json is not JSON"),
        (break_results, "belongs to another dataset"),
        (move_images, r"/nowhere/.*jpg: No such file"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_folder_that_is_no_whole_run_is_refused(run_folder, tmp_path, damage, message):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder, ignore=shutil.ignore_patterns("*.pth", "report.html"))
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        write_report(folder)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*report.html*"))


def test_every_test_set_is_named_and_shown(run_folder, known_results, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder, ignore=shutil.ignore_patterns("*.pth", "report.html"))
    config = (folder / "config.yaml").read_text()
    names = ["own_val", "by a function", "not evaluated"]
    lists = "".join(f"\n  - {name}" for name in names)
    (folder / "config.yaml").write_text(config.replace("TEST:\n  - own_val", f"TEST:{lists}"))
    for name in names[:2]:
        (folder / "inference" / name).mkdir()
        shutil.copy(known_results.results_file, folder / "inference" / name)
    # What the evaluation of a function's dicts leaves; one object fewer is a false detection more.
    content = json.loads(known_results.json_file.read_text())
    for image in content["images"]:
        image["file_name"] = str(known_results.images / image["file_name"])
    content["annotations"] = [a for a in content["annotations"] if not a["iscrowd"]][1:]
    (folder / "inference" / names[1] / "ground_truth.json").write_text(json.dumps(content))
    page = Page(write_report(folder).read_text())
    words = " ".join(page.text)
    assert all(f"Evaluation on {name}" in words for name in names)
    assert words.count("There are no results") == 1 and words.count("Confusion") == 2
    truth = read_truth(known_results.json_file)
    results, _ = read_results(known_results.results_file, truth)
    for each in (truth, read_truth(folder / "inference" / names[1] / "ground_truth.json")):
        whole = class_precisions(each, results, "segm")[0]
        values = map(whole.values.get, METRICS)
        cells = ["–" if np.isnan(v) else f"{v:.1f}" for v in values]
        assert any(row[1:7] == cells for row in page.rows)
