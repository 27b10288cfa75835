"""Weights files written by birder itself."""

import dataclasses
import hashlib
import logging
from pathlib import Path

import pytest
import torch
from birder.common import fs_ops
from birder.model_registry import registry
from birder.net.base import get_signature
from helpers import BIRDS, RGB_STATS, move_off_initial_values
from torch import nn

from rope_vit_det.weights import catalogue


@pytest.fixture
def birder_file(cache, tmp_path, monkeypatch):
    """Has birder build a network and write it; returns the path and the network."""
    logging.getLogger("birder").setLevel(logging.WARNING)

    def write(
        network: str = "rope_vit_reg1_t16",
        *,
        tag: str | None = "birds",
        size: tuple[int, int] = (224, 224),
        classes: dict[str, int] = BIRDS,
        config: dict | None = None,
        suffix: str = ".pt",
    ) -> tuple[Path, nn.Module]:
        net = registry.net_factory(network, len(classes), 3, config=config, size=size)
        move_off_initial_values(net)
        signature = get_signature((1, 3, *size), len(classes))
        monkeypatch.setattr(fs_ops.settings, "MODELS_DIR", tmp_path)
        name = network + (f"_{tag}" if tag else "")
        if suffix == ".safetensors":
            path = tmp_path / f"{name}{suffix}"
            fs_ops.save_st(
                net, str(path), net.task, classes, signature, RGB_STATS, external_config=config
            )
        else:
            nothing = (None,) * 4
            fs_ops.checkpoint_model(
                name, 7, net, signature, classes, RGB_STATS, *nothing, external_config=config
            )
            path = (tmp_path / f"{name}_7.pt").rename(tmp_path / f"{name}.pt")
        return path, net

    return write


@pytest.fixture
def published(birder_file, monkeypatch):
    """A small file of birder's in the catalogue, as `rope_vit_reg1_t16_birds`; and its content."""
    path, _ = birder_file()
    content = path.read_bytes()
    path.unlink()
    entry = dataclasses.replace(
        catalogue.resolve("rope_vit_reg4_b14_capi"),
        name="rope_vit_reg1_t16_birds",
        network="rope_vit_reg1_t16",
        tag="birds",
        sha256=hashlib.sha256(content).hexdigest(),
        hub_url="https://huggingface.co/somebody/another_name/resolve/main",
    )
    monkeypatch.setattr(catalogue, "published_weights", lambda: {entry.name: entry})
    return entry, content


@pytest.fixture
def birder_output():
    """Logits of a file in birder's own hands."""

    def run(path: Path, network: str, x: torch.Tensor, config: dict | None = None) -> torch.Tensor:
        net, _ = fs_ops.load_model(
            torch.device("cpu"),
            network,
            path=path,
            config=config,
            inference=True,
            st=path.suffix == ".safetensors",
        )
        return net(x)

    return run
