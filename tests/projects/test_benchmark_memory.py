"""Memory of a training step: what is kept for the backward pass, and the process's real peak."""

import pytest
import torch
from birder.model_registry import registry
from birder.net import rope_vit  # noqa: F401  (registers the networks)
from torch import nn

from projects.benchmark.memory import format_memory, measure_memory
from rope_vit_det import create_model
from rope_vit_det.errors import InputError


def bytes_kept(net: nn.Module, image: torch.Tensor) -> int:
    """Storage that the graph of a forward pass holds, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    storages = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = net.detection_features(image)
        kept = sum(storages.values())
    assert next(iter(out.values())).requires_grad
    return kept


def test_a_step_keeps_no_more_than_birders():
    oracle = registry.net_factory("rope_vit_reg1_t14", 0, size=(224, 224))
    oracle.set_dynamic_size()
    ours = create_model("rope_vit_reg1_t14")
    image = torch.randn(1, 3, 40 * 14, 40 * 14)
    plain = bytes_kept(ours.train(), image)
    assert plain <= bytes_kept(oracle.train(), image)
    ours.activation_checkpoint = True
    assert bytes_kept(ours, image) < plain / 8


def test_an_unknown_network_is_named():
    with pytest.raises(InputError, match=r"resnet.*known are global"):
        measure_memory(["resnet"])


@pytest.mark.slow
def test_peaks_of_the_cards_network_at_1024_pixels():
    """Real peaks of fresh processes, ours at stride 16 and birder's at 14: 64 x 64 tokens both."""
    results = measure_memory()
    print(format_memory(results))
    peaks = {(r["network"], r["activation_checkpoint"]): r["step_mib"] for r in results}
    for ours in ("global", "windowed"):
        assert peaks[ours, False] >= 2.5 * peaks[ours, True]
        assert peaks[ours, False] <= peaks["birder", False]
    assert all(result["process_mib"] > result["step_mib"] for result in results)
