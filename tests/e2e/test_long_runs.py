"""Memory, files and threads over thousands of images and iterations."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

COMMON = """
    import json, os, random, sys, threading
    import torch
    from detectron2.config import get_cfg
    from rope_vit_det import add_rope_vit_config

    def state():
        pages = int(open("/proc/self/statm").read().split()[1])
        return {
            "rss": pages * os.sysconf("SC_PAGE_SIZE"),
            "files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
        }

    cfg = get_cfg()
    add_rope_vit_config(cfg)
    cfg.merge_from_file(sys.argv[1])
    cfg.MODEL.DEVICE = "cpu"
    cfg.SOLVER.AMP.ENABLED = False
"""

INFERENCE = """
    from detectron2.modeling import build_model
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.TEST.DETECTIONS_PER_IMAGE = 10
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50, 20
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    rng = random.Random(0)
    for number in range(3100):
        height, width = rng.randint(64, 1024), rng.randint(64, 1024)
        if number == 50:
            height = width = 1024
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        with torch.no_grad():
            model([{"image": image, "height": height, "width": width}])
        if number == 99:
            before = state()
    tables = [len(m._tables) for m in model.modules() if hasattr(m, "_tables")]
    print(json.dumps({"before": before, "after": state(), "tables": tables}))
"""

TRAINING = """
    from detectron2.engine import HookBase
    from rope_vit_det.engine.trainer import Trainer

    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = tuple(range(64, 129, 4)), 192
    cfg.DATASETS.TEST = ()
    cfg.TEST.EVAL_PERIOD = 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 1, 2100, 50
    cfg.SOLVER.KEEP_CHECKPOINTS = 2
    cfg.DATALOADER.NUM_WORKERS = 1
    cfg.OUTPUT_DIR = sys.argv[2]

    class Look(HookBase):
        def after_step(self):
            if self.trainer.iter == 99:
                self.before = state()
            self.after = state()

    look = Look()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([look])
    trainer.train()
    tables = [len(m._tables) for m in trainer.model.modules() if hasattr(m, "_tables")]
    print(json.dumps({"before": look.before, "after": look.after, "tables": tables}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", [INFERENCE, TRAINING], ids=["inference", "training"])
def test_a_long_run_takes_no_more_memory_files_or_threads(small_demo_dataset, tmp_path, what):
    script = tmp_path / "long.py"
    script.write_text(textwrap.dedent(COMMON) + textwrap.dedent(what))
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", script, ROOT / "configs" / "demo.yaml", tmp_path / "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ
        | {
            "DETECTRON2_DATASETS": str(small_demo_dataset.parent),
            "PYTHONPATH": str(ROOT),
            # oneDNN keeps an entry for every shape, by default 1024 of them.
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
        },
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    found = json.loads(answer.stdout.splitlines()[-1])
    print(found)
    before, after = found["before"], found["after"]
    assert after["rss"] <= 1.1 * before["rss"]
    assert after["files"] <= before["files"]
    assert after["threads"] <= before["threads"]
    assert found["tables"] and max(found["tables"]) <= 64
