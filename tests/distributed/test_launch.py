"""Runs in several real processes, on the CPU."""

import json
import os
import re
import subprocess
import sys
import textwrap
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from torch.multiprocessing import ProcessRaisedException

from rope_vit_det.distributed import launch
from rope_vit_det.distributed.launch import check_processes
from rope_vit_det.errors import InputError, RunError, StoppedError

ROOT = Path(__file__).parents[2]
TRAIN = (ROOT / "tools" / "train_net.py", "--config-file", ROOT / "configs" / "demo.yaml")
TINY = (
    *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "20", "SOLVER.AMP.ENABLED", "False"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,80)", "INPUT.MAX_SIZE_TRAIN", "128"),
    *("INPUT.MIN_SIZE_TEST", "64", "TEST.EVAL_PERIOD", "0"),
)


@pytest.fixture
def run(small_demo_dataset, tmp_path):
    """Runs a command in a folder of its own."""
    environment = os.environ | {
        "DETECTRON2_DATASETS": str(small_demo_dataset.parent),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }

    def run(*command):
        return subprocess.run(
            [sys.executable, "-W", "ignore", *map(str, command)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=240,
        )

    return run


def _losses(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["iteration"]: row["total_loss"] for row in rows if "total_loss" in row}


def _weights(path):
    return torch.load(path, weights_only=True)["model"]


# Detectron2 logs the median of 20 losses; the test wants each of them.
EVERY_LOSS = """
    from detectron2.engine import hooks
    from detectron2.utils.events import JSONWriter
    from rope_vit_det.distributed.launch import launch
    from rope_vit_det.engine.main import _run_in_process
    from rope_vit_det.engine.setup import load_config
    from rope_vit_det.engine.trainer import Trainer
    from detectron2.engine import default_argument_parser

    def main(args, cfg):
        write = hooks.PeriodicWriter.__init__
        hooks.PeriodicWriter.__init__ = lambda self, writers, period: write(self, writers, 1)
        JSONWriter.__init__.__defaults__ = (1,)
        _run_in_process(args, cfg, Trainer)

    if __name__ == "__main__":
        args = default_argument_parser().parse_args()
        cfg = load_config(args)
        launch(main, args, cfg, device=cfg.MODEL.DEVICE)
"""


@pytest.mark.slow
def test_two_processes_are_one_that_accumulates(run, tmp_path):
    script = tmp_path / "every_loss.py"
    script.write_text(textwrap.dedent(EVERY_LOSS))
    config = TRAIN[1:]
    clip = ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model", "DATASETS.TEST", "()")
    for options, name in (
        (("--num-gpus", "2"), "two"),
        ((), "one"),
        (("--num-gpus", "2"), "two_again"),
    ):
        accumulate = ("SOLVER.ACCUMULATE", "2") if name == "one" else ()
        answer = run(script, *config, *options, *TINY, *clip, *accumulate, "OUTPUT_DIR", name)
        assert answer.returncode == 0, answer.stderr[-3000:]
    two, one = (_losses(tmp_path / name / "metrics.json") for name in ("two", "one"))
    assert len(two) == 20
    assert two == pytest.approx(one, rel=1e-4)
    assert len(set(two.values())) == 20
    two, one = (_weights(tmp_path / name / "model_final.pth") for name in ("two", "one"))
    for name, weight in one.items():
        assert torch.allclose(two[name], weight, rtol=1e-3, atol=1e-4), name


def test_two_processes_on_the_cpu_and_only_the_first_one_writes(run, tmp_path):
    short = (*TINY, "SOLVER.MAX_ITER", "2", "SOLVER.EMA.ENABLED", "True", "OUTPUT_DIR", "out")
    answer = run(*TRAIN, "--num-gpus", "2", *short)
    assert answer.returncode == 0, answer.stderr[-3000:]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.yaml", "log.txt", "metrics.json", "model_final.pth"} <= written
    assert not [name for name in written if "rank" in name]
    assert len([name for name in written if "tfevents" in name]) == 1
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["SEED"] == 7
    # Both processes' share of the four held-out images was evaluated.
    assert "Start inference on 2 batches" in answer.stdout


# Counts the calls, DDP's too, by a hook in place of its own; and the bytes of each of its buckets.
COUNTING = """
    import functools
    import json
    import torch.distributed as dist
    from rope_vit_det.distributed.launch import launch
    from rope_vit_det.engine.main import _run_in_process
    from rope_vit_det.engine.setup import load_config
    from rope_vit_det.engine.trainer import Trainer
    from detectron2.engine import default_argument_parser
    from detectron2.utils import comm
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    COLLECTIVES = [
        name
        for name in dir(dist)
        if name.startswith(("all_", "broadcast", "gather", "reduce", "scatter", "barrier"))
        and callable(getattr(dist, name))
    ]

    def main(args, cfg):
        called = []

        def counted(name):
            function = getattr(dist, name)

            @functools.wraps(function)
            def wrapped(*args, **kwargs):
                called.append(name)
                return function(*args, **kwargs)

            return wrapped

        for name in COLLECTIVES:
            setattr(dist, name, counted(name))
        reduced, steps = [], []

        def counting_hook(_, bucket):
            reduced.append(bucket.buffer().nbytes)
            return allreduce_hook(None, bucket)

        class Counting(Trainer):
            def before_train(self):
                super().before_train()
                self.model.register_comm_hook(None, counting_hook)

            def before_step(self):
                called.clear()
                reduced.clear()
                super().before_step()

            def after_step(self):
                super().after_step()
                trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
                steps.append([list(called), list(reduced), trained])

        _run_in_process(args, cfg, Counting)
        if comm.is_main_process():
            with open("steps.json", "w") as file:
                json.dump(steps, file)

    if __name__ == "__main__":
        args = default_argument_parser().parse_args()
        cfg = load_config(args)
        launch(main, args, cfg, device=cfg.MODEL.DEVICE)
"""


@pytest.mark.slow
def test_a_step_has_one_collective_beside_ddps(run, tmp_path):
    script = tmp_path / "counting.py"
    script.write_text(textwrap.dedent(COUNTING))
    short = (*TINY, "SOLVER.MAX_ITER", "3", "SOLVER.ACCUMULATE", "2", "SOLVER.IMS_PER_BATCH", "4")
    answer = run(
        script, *TRAIN[1:], "--num-gpus", "2", *short, "DATASETS.TEST", "()", "OUTPUT_DIR", "out"
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    for called, reduced, trained in json.loads((tmp_path / "steps.json").read_text())[:2]:
        # One of ours; DDP's are one a bucket.
        assert called == ["all_gather"] + ["all_reduce"] * len(reduced)
        # Of two micro-batches, each gradient once.
        assert sum(reduced) == trained > 0


SYNCHRONISING = """
    import json
    from rope_vit_det.distributed.launch import launch
    from rope_vit_det.engine.main import _run_in_process
    from rope_vit_det.engine.setup import load_config
    from rope_vit_det.engine.trainer import Trainer
    from detectron2.engine import default_argument_parser
    from detectron2.utils import comm
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    class Counting(Trainer):
        def before_train(self):
            super().before_train()
            self.counts = {}
            if comm.get_world_size() > 1:
                assert not self.model.find_unused_parameters
                self.model.register_comm_hook(None, self.count)

        def count(self, state, bucket):
            for parameter in bucket.parameters():
                self.counts[id(parameter)] = self.counts.get(id(parameter), 0) + 1
            return allreduce_hook(None, bucket)

        def after_train(self):
            super().after_train()
            if self.counts and comm.is_main_process():
                model = self.model.module
                counts = {n: self.counts.get(id(p), 0) for n, p in model.named_parameters()}
                with open("counts.json", "w") as file:
                    json.dump(counts, file)

    def main(args, cfg):
        _run_in_process(args, cfg, Counting)

    if __name__ == "__main__":
        args = default_argument_parser().parse_args()
        cfg = load_config(args)
        launch(main, args, cfg, device=cfg.MODEL.DEVICE)
"""


@pytest.mark.slow
def test_two_processes_synchronise_adapters_and_heads_alone(run, tmp_path):
    script = tmp_path / "synchronising.py"
    script.write_text(textwrap.dedent(SYNCHRONISING))
    short = (*TINY, "SOLVER.MAX_ITER", "3", "SOLVER.WARMUP_ITERS", "0", "DATASETS.TEST", "()")
    lora = ("MODEL.ROPE_VIT.LORA.RANK", "4", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model")
    # All levels are read, so that no unused parameter is looked for.
    lora += ("MODEL.RPN.IN_FEATURES", "['p3','p4','p5','p6','p7']")
    lora += ("MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]")
    for options, name in ((("--num-gpus", "2"), "two"), ((), "one")):
        accumulate = ("SOLVER.ACCUMULATE", "2") if name == "one" else ()
        answer = run(script, *TRAIN[1:], *options, *short, *lora, *accumulate, "OUTPUT_DIR", name)
        assert answer.returncode == 0, answer.stderr[-3000:]
    for name, count in json.loads((tmp_path / "counts.json").read_text()).items():
        frozen = name.startswith("backbone.net.") and ".lora_" not in name
        assert count == (0 if frozen else 3), name
    two, one = (_weights(tmp_path / name / "model_final.pth") for name in ("two", "one"))
    for name, weight in one.items():
        assert torch.allclose(two[name], weight, rtol=1e-3, atol=1e-4), name
        assert not name.endswith("lora_b") or weight.abs().max() > 1e-3, name


DYING = """
    from rope_vit_det.engine.train_step import TrainStep
    from rope_vit_det.engine.trainer import Trainer
    from rope_vit_det.distributed.launch import launch
    from rope_vit_det.engine.main import _run_in_process
    from rope_vit_det.engine.setup import load_config
    from rope_vit_det.errors import InputError, input_errors_as_one_line
    from detectron2.engine import default_argument_parser
    from detectron2.utils import comm

    def main(args, cfg):
        step = {method}
        def run_step(self, *args):
            if comm.get_rank() == 1 and self.iter == 1:
                raise {error}
            return step(self, *args)
        {method} = run_step
        _run_in_process(args, cfg, Trainer)

    if __name__ == "__main__":
        args = default_argument_parser().parse_args()
        with input_errors_as_one_line():
            cfg = load_config(args)
            launch(main, args, cfg, device=cfg.MODEL.DEVICE)
"""


def _run_dying(run, tmp_path, method, error):
    script = tmp_path / "dying.py"
    script.write_text(textwrap.dedent(DYING).replace("{method}", method).replace("{error}", error))
    # In the last iteration, which Detectron2's EvalHook takes for the end.
    short = (*TINY, "SOLVER.MAX_ITER", "2", "OUTPUT_DIR", "out")
    return run(script, *TRAIN[1:], "--num-gpus", "2", *short)


@pytest.mark.parametrize(
    ("error", "status"),
    [("ZeroDivisionError('rank 1 is dead')", 1), ("InputError('rank 1 has no file')", 2)],
)
@pytest.mark.slow
def test_a_dying_process_ends_the_run(run, tmp_path, error, status):
    answer = _run_dying(run, tmp_path, "Trainer.run_step", error)
    assert answer.returncode == status
    if status == 1:
        assert "Traceback" in answer.stderr and "ZeroDivisionError: rank 1 is dead" in answer.stderr
        assert re.search(r'File ".*dying.py", line \d+, in run_step', answer.stderr)
    else:
        assert answer.stderr.strip().splitlines()[-1] == "error: rank 1 has no file"
    assert not (tmp_path / "out" / "model_final.pth").exists()


@pytest.mark.slow
def test_a_model_that_gives_up_in_one_process_ends_all_with_its_batch(run, tmp_path):
    error = "FloatingPointError('boxes are not finite')"
    answer = _run_dying(run, tmp_path, "TrainStep.forward", error)
    assert answer.returncode == 3, answer.stderr[-3000:]
    last = answer.stderr.strip().splitlines()[-1]
    assert 'not finite at iteration 1: none ("boxes are not finite") for images' in last
    assert last.endswith("--replay out/diverged_0000001_1.pth")
    assert [path.name for path in (tmp_path / "out").glob("*.pth")] == ["diverged_0000001_1.pth"]


@pytest.mark.slow
def test_torchrun(run, tmp_path):
    short = (*TINY, "SOLVER.MAX_ITER", "2", "OUTPUT_DIR", "out")
    answer = run("-m", "torch.distributed.run", "--nproc-per-node", "2", *TRAIN, *short)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert "World size: 2" in answer.stdout
    assert (tmp_path / "out" / "model_final.pth").exists()
    both = run("-m", "torch.distributed.run", "--nproc-per-node", "2", *TRAIN, "--num-gpus", "2")
    assert both.returncode != 0 and "torchrun starts the processes" in both.stderr


THREADS = """
    import os
    os.environ["OMP_NUM_THREADS"] = "2"
    from argparse import Namespace
    import torch
    from detectron2.utils import comm
    from rope_vit_det.distributed.launch import launch

    def main(args, given):
        with open(f"threads_{comm.get_rank()}", "w") as file:
            file.write(f"{given} {torch.get_num_threads()}")

    launch(main, Namespace(num_gpus=1, num_machines=1), torch.get_num_threads(), device="cpu")
"""


@pytest.mark.slow
def test_under_torchrun_a_process_keeps_its_threads(run, tmp_path):
    script = tmp_path / "threads.py"
    script.write_text(textwrap.dedent(THREADS))
    answer = run("-m", "torch.distributed.run", "--nproc-per-node", "2", script)
    assert answer.returncode == 0, answer.stderr[-3000:]
    for rank in (0, 1):
        given, kept = (tmp_path / f"threads_{rank}").read_text().split()
        assert given == kept


@pytest.mark.slow
def test_a_lazy_config_runs_in_two_processes(run, tmp_path):
    recipe = "COCO-InstanceSegmentation/mask_rcnn_rope_vit_reg4_b14_100ep_lsj.py"
    answer = run(
        ROOT / "tools" / "lazyconfig_train_net.py",
        *("--config-file", ROOT / "configs" / recipe, "--num-gpus", "2", "--no-rehearsal"),
        *("model.backbone.net.name=rope_vit_reg4_demo16", "model.backbone.net.window_size=0"),
        *("model.roi_heads.num_classes=4", "train.init_checkpoint=", "train.output_dir=out"),
        *("train.max_iter=1", "train.eval_period=0", "dataloader.train.total_batch_size=2"),
        *(f"dataloader.{split}.mapper.augmentations=[]" for split in ("train", "test")),
        *(f"dataloader.{split}.num_workers=0" for split in ("train", "test")),
        "dataloader.train.dataset.names=rope_vit_det_demo_train",
        "dataloader.test.dataset.names=rope_vit_det_demo_val",
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert (tmp_path / "out" / "model_final.pth").exists()
    assert [path.name for path in tmp_path.rglob("log.txt*")] == ["log.txt"]


@pytest.mark.parametrize("kind", [InputError, RunError, StoppedError])
def test_an_error_of_another_process_is_raised_as_what_it_was(monkeypatch, kind):
    def one_died(*args, **kwargs):
        raise ProcessRaisedException(f"{kind.__module__}.{kind.__name__}: the reason", 1, 1)

    monkeypatch.setattr(launch, "detectron2_launch", one_died)
    args = Namespace(num_gpus=1, num_machines=1, machine_rank=0)
    with pytest.raises(kind, match=r"^the reason$") as error:
        launch.launch(print, args, device="cpu")
    assert type(error.value) is kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_gpus": 0}, "--num-gpus 0: give 1 or more"),
        ({"num_machines": 2}, "needs --dist-url tcp://HOST:PORT"),
    ],
)
def test_what_cannot_run(options, message):
    args = {"num_gpus": 1, "num_machines": 1, "machine_rank": 0, "dist_url": "tcp://127.0.0.1:1"}
    with pytest.raises(InputError, match=re.escape(message)):
        check_processes(Namespace(**args | options), "cpu")
