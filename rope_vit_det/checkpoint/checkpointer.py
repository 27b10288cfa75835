"""Detectron2's checkpointer: safe reading, errors that name the file, classes, averaged weights."""

import os
import socket
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs, urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn

from ..data.classes import Classes
from ..data.validation.check import check_same_classes
from ..detectron2_private import without_shared_keys
from ..errors import InputError, some_of
from ..models import RoPEViT
from ..weights.detectron2_format import BACKBONE, METADATA_KEY, detectron2_checkpoint
from ..weights.load import PREFIXES, as_birder_url
from ..weights.safe import COMPILED, load_pickle, load_torch_file
from .checkpoint_files import (
    check_tensors,
    prune_checkpoints,
    read_last_checkpoint,
    tag_checkpoint,
    write_checkpoint,
)
from .resume import Settings, changed_settings, kept_settings, start_anew

BEST = "model_best.pth"
_TIMEOUT = 30  # seconds without an answer of a web server


class DetectorCheckpointer(DetectionCheckpointer):
    """A :class:`DetectionCheckpointer` that runs no code of the files it reads.

    It takes plain paths to birder's files too. The backbone refuses half a load by itself, in any
    script; here the message gains the file, and the shapes that Detectron2 would drop with a log
    line.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        classes: Classes | None = None,
        settings: Settings | None = None,
        keep: int = 0,
        whole: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            model: what is evaluated, and saved as "model".
            save_dir: for the checkpoints.
            classes: saved as "classes", and those that a whole model must have been trained on.
            settings: of the run, saved as "settings", and compared with those of a checkpoint to
                resume from.
            keep: periodic checkpoints that are kept, the newest; 0: all.
            whole: every tensor of the model must be in what is loaded, as for an evaluation. A
                checkpoint to resume from always must be whole.
            kwargs: see :class:`DetectionCheckpointer`. Among them `trained_model`, the one that
                learns, where `model` is an average of its weights: it is saved for a resume, and
                gets the weights of `model`, whatever else is loaded. A run that goes on without an
                average goes on from the one that learned.
        """
        super().__init__(model, save_dir, **kwargs)
        self.classes = classes
        self.settings = None if settings is None else kept_settings(settings)
        self.keep = keep
        self.whole = whole
        self._read: tuple[str, Mapping[str, Any]] | None = None  # path and content, until loaded
        self._resumed = ""  # the checkpoint that is resumed from
        self._changed: list[str] = []  # settings, since that one

    def save(self, name: str, **kwargs: Any) -> None:
        """See `fvcore.common.checkpoint.Checkpointer.save`; the file appears whole or not at all.

        Raises:
            DiskFullError: it cannot be written.
        """
        if not (self.save_dir and self.save_to_disk):
            return
        data = {"model": self.model.state_dict()}
        data |= {key: each.state_dict() for key, each in self.checkpointables.items()}
        own = {"classes": self.classes, "settings": self.settings}
        data |= kwargs | {key: value for key, value in own.items() if value is not None}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        write_checkpoint(path, data)
        # The best lies beside the others: a run resumes from the last.
        if f"{name}.pth" != BEST:
            tag_checkpoint(self.save_dir, f"{name}.pth")
        if self.keep:
            prune_checkpoints(self.save_dir, self.keep)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """See `fvcore.common.checkpoint.Checkpointer.resume_or_load`.

        A damaged checkpoint is named, and the one before is used. Settings that differ from its own
        are named too. All processes are to call this.

        Raises:
            InputError: see :meth:`load`; or every checkpoint is damaged; or a run cannot go on with
                other settings.
        """
        last = read_last_checkpoint(self.save_dir) if resume and comm.is_main_process() else None
        self._read, path_of_last = last, comm.all_gather(last and last[0])[0]
        if not path_of_last:
            return self.load(path, checkpointables=[])
        self.whole, self._resumed = True, path_of_last
        try:
            return self._load(path_of_last)
        except InputError as error:
            text = str(error) if path_of_last in str(error) else f"{path_of_last}: {error}"
            if self._changed:
                text += f"; set otherwise since: {some_of(self._changed, 8)}"
                text += f"; set it back, {start_anew(path_of_last)}"
            raise InputError(text) from None

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See `fvcore.common.checkpoint.Checkpointer.load`.

        Raises:
            InputError: the file is missing, damaged, no checkpoint, would run code, has NaNs, or
                its backbone is not this model's; or it is to be the whole model, and is not.
        """
        try:
            return self._load(path, *args, **kwargs)
        except InputError as error:
            raise weights_error(path, error) from None

    def _load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        net = next((each for each in self.model.modules() if isinstance(each, RoPEViT)), None)
        try:
            check_weights_path(path, for_rope_vit=net is not None)
            path = as_birder_url(path)
            dtype = torch.float32 if net is None else net.conv_proj.weight.dtype
            if dtype != torch.float32 and path.startswith(PREFIXES):
                # Detectron2's way would hold them in float32 first.
                path = str(detectron2_checkpoint(path, dtype))
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # Detectron2 forgets it where a load fails
            self._read = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        # Detectron2's own, over readers that run nothing.
        if self._read and self._read[0] == filename:
            return dict(self._read[1])
        is_pickle = filename.endswith(".pkl")
        loaded = load_pickle(filename) if is_pickle else load_torch_file(filename)
        if not isinstance(loaded, Mapping):
            raise InputError(f"{filename} is no checkpoint: it holds a {type(loaded).__name__}")
        if is_pickle and not ("model" in loaded and "__author__" in loaded):
            blobs = loaded.get("blobs", loaded).items()
            model = {key: value for key, value in blobs if not str(key).endswith("_momentum")}
            loaded = {"model": model, "__author__": "Caffe2", "matching_heuristics": True}
        loaded = dict(loaded) if "model" in loaded else {"model": loaded}
        check_tensors(filename, loaded["model"])
        query = getattr(self._parsed_url_during_load, "query", "")
        if parse_qs(query).get("matching_heuristics") == ["True"]:
            loaded["matching_heuristics"] = True
        return loaded

    def _load_model(self, checkpoint: Any) -> Any:
        if self._resumed and self.settings is not None:
            self._changed = changed_settings(self._resumed, checkpoint, self.settings)
            if self._changed:
                words = "The run goes on with other settings than it had: %s"
                self.logger.warning(words, ", ".join(self._changed))
            if "trained_model" not in self.checkpointables:  # averaged until now
                checkpoint["model"] = checkpoint.pop("trained_model", checkpoint["model"])
        checkpoint["model"] = _named_as(self.model, checkpoint["model"])
        trained = self.checkpointables.get("trained_model")
        if trained is not None and "trained_model" in checkpoint:
            checkpoint["trained_model"] = _named_as(trained, checkpoint["trained_model"])
        weights, theirs = checkpoint["model"], classes_of(checkpoint)
        if self.whole and self.classes and theirs:
            names = self.classes["names"]
            check_same_classes(names, "the dataset", theirs["names"], "the checkpoint")
        modules = self.model.named_modules()
        networks = tuple(name and f"{name}." for name, each in modules if isinstance(each, RoPEViT))
        # A birder file says what it is, and the backbone then names the lines to set.
        is_birders = METADATA_KEY in getattr(weights, "_metadata", {}).get(BACKBONE, {})
        for name, own in self.model.state_dict().items():
            shape = weights[name].shape if name in weights else own.shape
            if shape != own.shape and name.startswith(networks) and not is_birders:
                raise InputError(
                    f"{name} has shape {tuple(shape)} in the checkpoint and "
                    f"{tuple(own.shape)} in the model; set MODEL.ROPE_VIT."
                    f"{'LORA.RANK' if '.lora_' in name else 'NAME and IMAGE_SIZE'} to what the "
                    "checkpoint was made with"
                )
        incompatible = super()._load_model(checkpoint)
        if self.whole:
            self._check_whole(incompatible)
        if trained is not None:
            trained.load_state_dict(self.model.state_dict())
        return incompatible

    def _check_whole(self, incompatible: Any) -> None:
        for key, found, wanted in incompatible.incorrect_shapes:
            raise InputError(
                f"{key} has shape {found} in the checkpoint and {wanted} in the model; take the "
                "config that it was trained with (config.yaml beside it)"
            )
        missing = without_shared_keys(self.model, incompatible.missing_keys)
        if missing:
            raise InputError(
                f"the checkpoint lacks {len(missing)} tensors of the model, the first is "
                f"{missing[0]}; take a trained detector, and the config that it was trained with "
                "(config.yaml beside it)"
            )


def read_classes(path: str) -> Classes | None:
    """The classes that a checkpoint was trained on; None for one that does not say.

    Args:
        path: of a checkpoint of :class:`DetectorCheckpointer`. Other files say nothing.
    """
    with suppress(InputError):  # whoever loads it will say what is wrong
        if path.endswith(".pth") and os.path.isfile(path):
            return classes_of(load_torch_file(path, mmap=True))
    return None


def classes_of(checkpoint: Any) -> Classes | None:
    """What a loaded checkpoint holds as its classes; None where that is nothing of ours."""
    match checkpoint:
        case {"classes": {"names": [*names], "ids": [*ids]}} if len(names) == len(ids):
            return {"names": names, "ids": ids}
    return None


def check_weights_path(path: str, *, for_rope_vit: bool = True) -> None:
    """Finds out whether MODEL.WEIGHTS can be loaded, without reading it; downloads web addresses.

    Args:
        for_rope_vit: the weights of other networks are of no use.

    Raises:
        InputError: it cannot, or the file does not exist.
    """
    if not path or path.startswith(PREFIXES):
        return
    if path.startswith("detectron2://"):
        if for_rope_vit:
            raise InputError(
                "Detectron2's model zoo has no RoPE ViT, this is another network; set "
                "MODEL.WEIGHTS to weights of a RoPE ViT, or to '' to start from random weights"
            )
    elif path.startswith(("http://", "https://")):
        _download(path)
    elif PathManager.isdir(path):
        raise InputError("a folder, not a file")
    elif not PathManager.isfile(path):
        scheme, found, _ = path.partition("://")
        raise InputError("no such file" + (f", and nothing that reads {scheme}://" * bool(found)))


def weights_error(path: str, error: InputError) -> InputError:
    """The error with the key and file in front, once."""
    return InputError(f"MODEL.WEIGHTS{'' if path in str(error) else ' ' + path}: {error}")


def _named_as(model: nn.Module, weights: Any) -> Any:
    """A state dict with the model's names, where either is of a model that torch.compile wraps."""
    own = {name.replace(COMPILED, ""): name for name in model.state_dict()}
    plain = ((name.replace(COMPILED, ""), value) for name, value in weights.items())
    renamed = OrderedDict((own.get(name, name), value) for name, value in plain)
    metadata = getattr(weights, "_metadata", {})
    places = {f"{name}.".replace(COMPILED, "")[:-1]: each for name, each in metadata.items()}
    vars(renamed)["_metadata"] = OrderedDict(metadata | places)
    return renamed


def _download(url: str) -> None:
    """Into PathManager's cache, where every process then finds it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)  # PathManager has none, and would wait for ever
    try:
        PathManager.get_local_path(urlparse(url)._replace(query="").geturl())
    except OSError as error:
        raise InputError(
            f"cannot be downloaded ({getattr(error, 'reason', error)}); get the file by other "
            "means and name its path"
        ) from None
    finally:
        socket.setdefaulttimeout(before)
