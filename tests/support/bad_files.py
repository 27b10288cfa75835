"""A corpus of weights files that must be refused: hostile, damaged, or of something else."""

import argparse
import collections
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

# What a hostile file would leave in the working directory.
TRACE = "code-was-run"


class _Runs:
    """Pickled as a call."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


def _calls() -> dict[str, tuple[_Runs, str]]:
    import builtins

    mkdir = f"__import__('os').mkdir({TRACE!r})"
    return {
        "os": (_Runs(os.mkdir, TRACE), "posix.mkdir"),
        "system": (_Runs(os.system, f"mkdir {TRACE}"), "posix.system"),
        "eval": (_Runs(eval, mkdir), "eval"),
        "exec": (_Runs(exec, mkdir), "exec"),
        "getattr": (_Runs(getattr, os, "mkdir"), ""),
        "import": (_Runs(builtins.__import__, "os"), "__import__"),
        "open": (_Runs(open, TRACE, "w"), "open"),
        "numpy": (_Runs(np.save, TRACE, 1), "numpy.save"),
        "torch": (_Runs(torch.save, 1, TRACE), "torch.serialization.save"),
    }


def hostile_files(folder: Path) -> dict[Path, str]:
    """Files that would run code, and the name of what they would call."""
    files = {}
    for name, (call, told) in _calls().items():
        if name == "getattr":
            continue  # a module cannot be pickled; see the hand-written ones
        for where, content in (
            ("value", {"model": {"backbone.net.class_token": call}}),
            ("aside", {"model": {}, "state": {}, "__author__": call}),
        ):
            for suffix in (".pth", ".pt"):
                path = folder / f"{name}-{where}{suffix}"
                torch.save(content, path)
                files[path] = told
            for protocol in (0, 2, 4, 5):
                path = folder / f"{name}-{where}-{protocol}.pkl"
                path.write_bytes(pickle.dumps(content, protocol))
                files[path] = told
        path = folder / f"{name}-old.pth"
        torch.save({"model": call}, path, _use_new_zipfile_serialization=False)
        files[path] = told
        path = folder / f"{name}-bare.pth"
        path.write_bytes(pickle.dumps({"model": call}))
        files[path] = told
    by_hand = {
        # getattr(os, "mkdir")(TRACE), spelt in opcodes
        "getattr": b"cbuiltins\ngetattr\n(cos\n__dict__\nVmkdir\ntR(V" + TRACE.encode() + b"\ntR.",
        # a method of what is allowed
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93.",
        "codecs": b"c_codecs\ndecode\n(V" + TRACE.encode() + b"\nVrot13\ntR.",
        "encode": b"c_codecs\nencode\n(V" + TRACE.encode() + b"\nVrot13\ntR.",
        "loads": b"cpickle\nloads\n(Vx\ntR.",
        "object": b"c__builtin__\nobject\n.",
    }
    told = {"encode": "_codecs.encode", "codecs": "_codecs.decode", "loads": "pickle.loads"}
    told |= {"getattr": "builtins.getattr", "dotted": "numpy.ndarray.dump"}
    told |= {"object": "builtins.object"}
    for name, content in by_hand.items():
        path = folder / f"{name}-by-hand.pkl"
        path.write_bytes(content)
        files[path] = told[name]
    for name, thing in (
        ("namespace", argparse.Namespace(a=1)),
        ("module", nn.Linear(2, 2)),
        ("chainmap", collections.ChainMap()),
    ):
        for suffix in (".pth", ".pt"):
            path = folder / f"{name}{suffix}"
            torch.save({"model": thing}, path)
            files[path] = type(thing).__name__
    path = folder / "script.pth"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    files[path] = "TorchScript"
    return files


def broken_files(folder: Path, whole: dict[str, Path]) -> dict[Path, str]:
    """Damaged files and ones of something else, and what must be said of them.

    Args:
        whole: a good file for each of the suffixes ".pth", ".pt", ".safetensors", ".pkl".
    """
    files = {}

    def add(name: str, content: bytes, told: str) -> None:
        path = folder / name
        path.write_bytes(content)
        files[path] = told

    for suffix, path in whole.items():
        good = path.read_bytes()
        stem = path.stem
        add(f"{stem}-empty{suffix}", b"", "is empty")
        for share in (0.001, 0.1, 0.5, 0.99):
            part = good[: int(len(good) * share)]
            add(f"{stem}-{share}{suffix}", part, "damaged")
        add(f"{stem}-short{suffix}", good[:-9], "damaged")
        add(f"{stem}-text{suffix}", b"version https://git-lfs.github.com/spec/v1\n", "damaged")
        add(f"{stem}-html{suffix}", b"<!doctype html><title>404</title>", "damaged")
        add(f"{stem}-zeros{suffix}", bytes(1000), "damaged")
        add(f"{stem}-noise{suffix}", np.random.default_rng(0).bytes(5000), "damaged")
        add(f"{stem}-png{suffix}", b"\x89PNG\r\n\x1a\n" + bytes(100), "damaged")
        (folder / f"{stem}-folder{suffix}").mkdir()
        files[folder / f"{stem}-folder{suffix}"] = "not a file"
        files[folder / f"{stem}-nowhere{suffix}"] = "no such file"
    return files
