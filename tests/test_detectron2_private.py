"""What Detectron2 and fvcore do not document is still there, and nothing else of it is used."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from detectron2.data.samplers import RandomSubsetTrainingSampler, TrainingSampler
from detectron2.engine import TrainerBase, hooks
from detectron2.evaluation import COCOEvaluator, LVISEvaluator
from detectron2.modeling.backbone.fpn import FPN
from detectron2.utils import logger
from detectron2.utils.events import EventStorage, JSONWriter, TensorboardXWriter
from torch import nn

import rope_vit_det
from rope_vit_det import detectron2_private

PACKAGE = Path(rope_vit_det.__file__).parent
# What our subclasses use of themselves, and evaluators' users of them, by the class that has it.
INHERITED = {
    hooks.BestCheckpointer: {"_checkpointer", "_period", "_val_metric", "_best_checking"},
    hooks.PreciseBN: {"_model"},
    TrainerBase: {"_hooks"},
    FPN: {"_size_divisibility"},
    COCOEvaluator: {"_tasks_from_predictions", "_derive_coco_results", "_eval_predictions",
                    "_predictions", "_results", "_do_evaluation", "_max_dets_per_image",
                    "_kpt_oks_sigmas"},
    LVISEvaluator: {"_tasks_from_predictions", "_eval_predictions", "_predictions"},
}  # fmt: skip
# Private by their spelling alone.
PUBLIC = {"_apply", "_replace", "_exit", "_target_", "_modules", "_parameters", "_buffers"}


@pytest.mark.parametrize(
    ("owner", "name"),
    [(owner, name) for owner, names in INHERITED.items() for name in sorted(names)],
)
def test_what_subclasses_use_is_there(owner, name):
    functions = [each for each in vars(owner).values() if inspect.isfunction(each)]
    used = {each for function in functions for each in function.__code__.co_names}
    assert hasattr(owner, name) or name in used, f"{owner.__name__}.{name} is gone"


def test_no_other_file_uses_what_others_do_not_document():
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    nodes = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    ours = set().union(PUBLIC, *INHERITED.values())
    for _, node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            ours.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            ours.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            ours |= {node.attr} if ast.unparse(node.value) == "self" else set()
    strange = []
    for path, node in nodes:
        names = [node.attr] if isinstance(node, ast.Attribute) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [each.name for each in node.names]
        hidden = [n for n in names if n.startswith("_") and not n.startswith("__")]
        if {*hidden} - ours and not path.name.endswith("_private.py"):
            strange.append(f"{path.relative_to(PACKAGE)}, line {node.lineno}: {hidden}")
    assert not strange


@pytest.mark.parametrize("sampler", [TrainingSampler(5), RandomSubsetTrainingSampler(6, 0.5)])
def test_the_stream_of_a_sampler_is_what_it_gives(sampler):
    sampler._seed = 3
    stream, own = detectron2_private.endless_indices(sampler), iter(sampler)
    assert stream is not None
    assert [next(stream) for _ in range(20)] == [next(own) for _ in range(20)]
    assert detectron2_private.endless_indices(torch.utils.data.SequentialSampler([1])) is None


def test_keys_of_shared_parameters_are_not_missing():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    missing = ["1.weight", "2.weight"]
    assert detectron2_private.without_shared_keys(model, missing) == ["2.weight"]


def test_a_timer_leaves_no_iteration_out():
    timer = hooks.IterationTimer()
    detectron2_private.time_every_iteration(timer)

    class Trainer(TrainerBase):
        def run_step(self):
            pass

    trainer = Trainer()
    trainer.register_hooks([timer])
    with EventStorage() as trainer.storage:
        trainer.start_iter, trainer.max_iter = 0, 1
        trainer.iter = 0
        timer.before_train()
        timer.before_step()
        timer.after_step()
        assert "time" in trainer.storage.histories()


@pytest.mark.parametrize("kind", ["json", "tensorboard"])
def test_a_writer_goes_on_where_it_is_told_to(tmp_path, kind):
    file = tmp_path / "metrics.json"
    writer = JSONWriter(str(file)) if kind == "json" else TensorboardXWriter(str(tmp_path))
    assert detectron2_private.last_written(writer) < 0
    with EventStorage(0) as storage:
        for storage.iter in range(6):
            if storage.iter == 3:
                at = detectron2_private.go_on_after(writer, 4)
                assert at == (str(file) if kind == "json" else None)
            storage.put_scalar("loss", float(storage.iter))
            writer.write()
            assert detectron2_private.last_written(writer) == max(
                storage.iter, 4 if storage.iter >= 3 else 0
            )
    writer.close()
    if kind == "json":
        numbers = [ast.literal_eval(line)["iteration"] for line in file.read_text().splitlines()]
        assert numbers == [0, 1, 2, 5]


def test_what_is_logged_once_is_logged_again(caplog):
    def say():
        logger.log_first_n(30, "once", key="message")

    with detectron2_private.logged_once():
        say()
        say()
    say()
    say()
    assert [record.message for record in caplog.records] == ["once"] * 2
