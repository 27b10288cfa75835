"""Downloads from a server on loopback, honest and not."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from birder.conf import settings
from birder.model_registry import registry
from helpers import birders_weights
from hub_server import hub_server, take_for_the_hub
from huggingface_hub import constants

from rope_vit_det import load_model
from rope_vit_det.errors import InputError
from rope_vit_det.models import VARIANTS
from rope_vit_det.weights import catalogue, hub

NAME = "rope_vit_reg1_t16_birds"


@pytest.fixture
def server(published, monkeypatch):
    """A hub with the published file, which `huggingface_hub` takes for its own."""
    _, content = published
    with hub_server({f"/somebody/another_name/resolve/main/{NAME}.pt": content}) as server:
        take_for_the_hub(server, monkeypatch)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 20)
        clock = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
        for module in ("file_download", "utils._http"):
            monkeypatch.setattr(f"huggingface_hub.{module}.time", clock)
        yield server


@pytest.fixture
def birders_own_address(published, server, monkeypatch):
    """The same server, as the plain address of files that no hub has."""
    entry, content = published
    entry = dataclasses.replace(entry, hub_url=None)
    monkeypatch.setattr(catalogue, "published_weights", lambda: {NAME: entry})
    monkeypatch.setattr(catalogue, "BIRDER_BASE_URL", server.url + "/models")
    server.files = {f"/models/{NAME}.pt": content}
    return server


@pytest.fixture(params=["hub", "birder"])
def either(request):
    return request.getfixturevalue(
        {"hub": "server", "birder": "birders_own_address"}[request.param]
    )


def test_repository_and_file_come_from_the_url_of_the_entry(server, published):
    path = hub.fetch(published[0])
    assert path.read_bytes() == published[1]
    assert path.name == NAME + ".pt"
    assert {r[1] for r in server.requests} == {f"/somebody/another_name/resolve/main/{NAME}.pt"}


def test_a_name_loads(either):
    model, info = load_model(NAME)
    assert (info.network, info.tag, info.num_classes) == ("rope_vit_reg1_t16", "birds", 3)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert load_model("birder://" + NAME)[1] == info


def test_what_is_cached_needs_no_network(either, published):
    hub.fetch(catalogue.resolve(NAME))
    either.requests.clear()
    either.behaviour = 500
    assert hub.fetch(catalogue.resolve(NAME)).read_bytes() == published[1]
    assert not either.requests


def test_a_broken_connection_is_taken_up_where_it_broke(either, published):
    either.behaviour = "hiccup"
    assert hub.fetch(catalogue.resolve(NAME)).read_bytes() == published[1]
    gets = [r for r in either.requests if r[0] == "GET"]
    assert [_from(r) > 0 for r in gets] == [False, True]


def _from(request):
    """The byte that a request wants to begin with."""
    return int((request[2] or "bytes=0-").removeprefix("bytes=").split("-")[0])


@pytest.mark.parametrize("behaviour", ["tamper", "shorten", "redirect"])
def test_another_file_loads_nothing(either, published, behaviour):
    either.behaviour = behaviour
    with pytest.raises(InputError, match="nothing was loaded") as error:
        load_model(NAME)
    line = str(error.value)
    assert "\n" not in line
    assert f"expected {published[0].sha256}" in line
    command = line.split("remove it (")[1].split(")")[0]
    served = either.files[next(iter(either.files))]
    served = served[: len(served) // 2] if behaviour == "shorten" else served
    assert Path(line.split(" is not ")[0]).stat().st_size == len(served)

    # Not even a second time, without a download; the command mends it.
    either.behaviour = "honest"
    with pytest.raises(InputError, match="nothing was loaded"):
        load_model(NAME)
    subprocess.run(command, shell=True, check=True)
    assert load_model(NAME)[1].num_classes == 3


def test_a_connection_that_always_breaks(either, published, cache):
    either.behaviour = "truncate"
    with pytest.raises(InputError, match="cannot be downloaded") as error:
        load_model(NAME)
    assert "\n" not in str(error.value)
    assert not list(cache.rglob("*.pt"))


def test_a_server_that_falls_silent(either, published, monkeypatch, cache):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    either.behaviour = "stall"
    with pytest.raises(InputError, match=r"cannot be downloaded.*Timeout"):
        load_model(NAME)
    assert not list(cache.rglob("*.pt"))


@pytest.mark.parametrize("status", [404, 401, 403])
def test_a_server_without_the_file(either, status):
    either.behaviour = status
    with pytest.raises(InputError, match=f"cannot be downloaded .*{status}"):
        load_model(NAME)


@pytest.mark.parametrize("offline", [True, False])
def test_offline_says_where_to_get_the_file_and_where_to_put_it(
    either, published, monkeypatch, offline
):
    if offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        either.shutdown()
        either.server_close()
    with pytest.raises(InputError) as error:
        load_model(NAME)
    line = str(error.value)
    assert "\n" not in line
    assert either.url + next(iter(either.files)) in line
    assert ("HF_HUB_OFFLINE" in line) == offline
    place = Path(line.split("put it at ")[1])
    place.write_bytes(published[1])
    assert load_model(NAME)[1].num_classes == 3
    place.write_bytes(published[1][:-1])
    with pytest.raises(InputError, match=f"remove it .rm {place}"):
        load_model(NAME)


FETCH = """
import dataclasses
from rope_vit_det.weights import catalogue, hub

catalogue.BIRDER_BASE_URL = constants.ENDPOINT + "/models"
for entry in (on_a_hub, dataclasses.replace(on_a_hub, name=on_a_hub.name + "2", hub_url=None)):
    print(hub.fetch(entry))
"""


@pytest.mark.slow
def test_two_processes_at_once_end_with_whole_files(published, tmp_path, server):
    """From a hub, and from birder's own address."""
    entry, content = published
    server.files[f"/models/{NAME}2.pt"] = content
    given = "from huggingface_hub import constants\nfrom rope_vit_det.weights import catalogue\n"
    command = [sys.executable, "-W", "ignore", "-c"]
    command += [f"{given}on_a_hub = catalogue.{entry!r}\n{FETCH}"]
    environment = os.environ | {"HF_ENDPOINT": server.url}
    pipe = {"stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipe) for _ in range(2)]
    answers = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    (paths,) = (answer.split() for answer in answers)
    assert [Path(path).name for path in paths] == [f"{NAME}.pt", f"{NAME}2.pt"]
    assert all(Path(path).read_bytes() == content for path in paths)
    assert not list(tmp_path.rglob("*.incomplete"))


def test_the_catalogue_is_birders_registry():
    """All weights of the networks that this project has."""
    birders = {
        name: entry
        for name, entry in registry._pretrained_nets.items()
        if entry["net"]["network"] in VARIANTS and "backbone" not in entry
    }
    ours = birders_weights()
    assert ours.keys() == birders.keys()
    for name, entry in ours.items():
        other = birders[name]
        assert (entry.network, entry.tag) == (other["net"]["network"], other["net"]["tag"])
        assert entry.sha256 == other["formats"]["pt"]["sha256"]
        url = other.get("url", settings.REGISTRY_BASE_URL)
        assert entry.url == f"{url}/{name}.pt"
        assert entry.image_size == tuple(other["resolution"])


def test_an_unknown_name_names_the_close_one():
    with pytest.raises(InputError, match=r"did you mean .rope_vit_reg4_b14_capi-imagenet21k."):
        load_model("rope_vit_reg4_b14_capi-imagenet21")
    with pytest.raises(InputError, match=r"published are .*rope_vit_s14_swiglu_avg_eva-bio"):
        load_model("resnet50")
