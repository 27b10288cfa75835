"""One model at any size: caches, random rescaling, precision, several processes."""

import copy
import math

import pytest
import torch
import torch.multiprocessing
from helpers import move_off_initial_values, relative_difference
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rope_vit_det import create_model
from rope_vit_det.layers import rope
from rope_vit_det.models import rope_vit

SMALL = "rope_vit_reg4_demo16"


def small_model(**kwargs):
    return move_off_initial_values(create_model(SMALL, global_blocks=[3], **kwargs))


def assert_serves(model, sizes):
    """Each size, in this order, gives what a network that has seen no other size gives."""
    for height, width in sizes:
        x = torch.randn(1, 3, height, width)
        with torch.inference_mode():
            expected = copy.deepcopy(model).detection_features(x)["neck"]
            neck = model.detection_features(x)["neck"]
        assert neck.shape == (1, model.hidden_dim, height // 16, width // 16)
        assert relative_difference(neck, expected) < 1e-6, (height, width)


def test_one_model_serves_all_sizes():
    model = small_model(window_size=16, pt_grid_size=(16, 16))
    assert_serves(model, [(64, 64), (512, 2048), (16, 2048), (800, 608), (64, 64), (16, 16)])


@pytest.mark.slow
def test_one_model_serves_64_to_2048_pixels():
    model = small_model(window_size=16)
    assert_serves(model, [(64, 64), (2048, 2048), (1216, 800), (2048, 64), (64, 64)])


def test_tables_belong_to_their_precision():
    model = small_model(window_size=4)
    x = torch.randn(1, 3, 7 * 16, 10 * 16)
    with torch.inference_mode():
        expected = model.detection_features(x)["neck"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            first = model.detection_features(x)["neck"]
        half = copy.deepcopy(model).bfloat16().detection_features(x.bfloat16())["neck"]
        assert half.dtype == torch.bfloat16
        for other in (first, half):
            assert 1e-4 < relative_difference(other.float(), expected) < 3e-2
        assert relative_difference(model.detection_features(x)["neck"], expected) < 1e-6
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = model.detection_features(x)["neck"]
        assert relative_difference(again.float(), first.float()) < 1e-3


@pytest.mark.parametrize("window", [0, 4])
def test_rescaling_multiplies_positions(monkeypatch, window):
    """Mapping a grid (or window) onto one that is 1.5 times as large does the same."""
    model = small_model(window_size=window, rescale_coords=2.0)
    x = torch.randn(1, 3, 10 * 16, 14 * 16)
    model.pt_grid_size = (15, 21)
    if window:  # of 4 x 4: onto 6 x 6; all blocks windowed, for global ones map from the grid
        model.global_blocks = frozenset()
        model.pt_grid_size = (6, 6)
    with torch.no_grad():
        expected = model.detection_features(x)["neck"]
        model.pt_grid_size = None
        in_evaluation = model.detection_features(x)["neck"]
        monkeypatch.setattr(rope_vit, "random_scale", lambda most, device: torch.tensor([1.5]))
        assert relative_difference(model.train().detection_features(x)["neck"], expected) < 1e-5
        # Nothing of it stays: neither in evaluation nor in the tables that are remembered.
        monkeypatch.undo()
        again = model.eval().detection_features(x)["neck"]
        assert relative_difference(again, in_evaluation) < 1e-6
    assert relative_difference(in_evaluation, expected) > 1e-4


def test_random_scales_are_log_uniform():
    logs = torch.cat([rope.random_scale(3.0, torch.device("cpu")) for _ in range(2000)]).log()
    limit = math.log(3)
    assert logs.abs().max() <= limit and abs(logs.mean()) < 0.1
    assert abs(logs.std() - 2 * limit / math.sqrt(12)) < 0.05


def test_each_training_step_draws_its_own_scale():
    model = small_model(rescale_coords=2.0).train()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        first, second = (model.detection_features(x)["neck"] for _ in range(2))
    assert relative_difference(first, second) > 1e-4
    assert len(model.rope._tables) == 0


def test_recomputed_activations_have_the_scale_of_the_forward_pass():
    plain = small_model(window_size=4, rescale_coords=2.0)
    saving = copy.deepcopy(plain)
    saving.activation_checkpoint = True
    x = torch.randn(2, 3, 70 // 14 * 16, 96)
    for model in (plain, saving):
        torch.manual_seed(1)
        model.train().detection_features(x)["neck"].square().mean().backward()
    for (key, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if a.grad is not None:
            assert relative_difference(b.grad, a.grad) < 1e-5, key


@pytest.mark.parametrize("value", [0.5, 0, -2])
def test_a_scale_below_one_is_refused(value):
    with pytest.raises(ValueError, match=r"rescale_coords.*1 or more"):
        create_model(SMALL, rescale_coords=value)


def _errors(name, oracle_net, window_size=0):
    """Of autocast and of the cast network, ours and birder's, against fp32."""
    ours = create_model(name, window_size=window_size).eval()
    ours.load_state_dict(oracle_net.state_dict())
    patch = ours.patch_size
    x = torch.randn(1, 3, 20 * patch, 27 * patch)

    def neck(net, x):
        return next(iter(net.detection_features(x).values())).float()

    with torch.inference_mode():
        exact, oracle_exact = neck(ours, x), neck(oracle_net, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = relative_difference(neck(ours, x), exact)
        cast = relative_difference(neck(ours.bfloat16(), x.bfloat16()), exact)
        oracle_cast = neck(copy.deepcopy(oracle_net).bfloat16(), x.bfloat16())
    return autocast, cast, relative_difference(oracle_cast, oracle_exact)


def _oracle(name):
    from birder.model_registry import registry
    from birder.net import rope_vit  # noqa: F401  (registers the networks)

    net = registry.net_factory(name, 0, size=(224, 224))
    net.set_dynamic_size()
    return move_off_initial_values(net)


def test_half_precision_is_no_worse_than_birders():
    autocast, cast, birders_cast = _errors("rope_vit_reg1_t14", _oracle("rope_vit_reg1_t14"))
    assert autocast < 1e-2
    assert cast < 3e-2 and cast <= birders_cast


@pytest.mark.slow
@pytest.mark.parametrize("window_size", [0, 16])
def test_half_precision_of_the_cards_network(window_size):
    oracle = _oracle("rope_vit_reg4_b14")
    autocast, cast, birders_cast = _errors("rope_vit_reg4_b14", oracle, window_size)
    assert autocast < 1e-2
    assert cast < 3e-2
    if window_size == 0:
        assert cast <= birders_cast


def _train_in_parallel(rank: int, folder: str, compile: bool) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    real = torch.compile
    torch.compile = lambda *a, **k: real(*a, **k, backend="aot_eager")
    kwargs = dict(window_size=4, global_blocks=[3])
    kwargs |= dict(compile=compile, activation_checkpoint=compile)
    net = _Neck(create_model(SMALL, **kwargs, features_only=True))
    net.load_state_dict(torch.load(f"{folder}/weights.pth"))
    model = DistributedDataParallel(net)
    for x in torch.load(f"{folder}/images.pth")[rank]:
        model(x).square().mean().backward()
    if rank == 0:
        torch.save({k: p.grad for k, p in net.named_parameters()}, f"{folder}/grads.pth")
    torch.distributed.destroy_process_group()


class _Neck(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net.detection_features(x)["neck"]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.slow
def test_two_processes_with_images_of_different_sizes(tmp_path, compile):
    net = _Neck(small_model(window_size=4, features_only=True))
    sizes = [[(64, 112), (96, 96)], [(160, 48), (16, 64)]]  # by process
    images = [[torch.randn(1, 3, *size) for size in of_rank] for of_rank in sizes]
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    torch.save(images, tmp_path / "images.pth")
    torch.multiprocessing.spawn(_train_in_parallel, (str(tmp_path), compile), nprocs=2)
    found = torch.load(tmp_path / "grads.pth")
    for x in (image for of_rank in images for image in of_rank):
        (net(x).square().mean() / 2).backward()  # DDP takes the mean over processes
    for key, parameter in net.named_parameters():
        assert relative_difference(found[key], parameter.grad) < 1e-4, key
