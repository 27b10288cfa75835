"""Weights files changed at random, in their bytes and in what they hold."""

import copy
import io
import itertools
import json
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

MAX_CHANGES = 4
_NUMBERS = (0, 1, -1, 2, 127, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 10**30)
# What a pickle may not call, in the form of its opcode GLOBAL; and some that it may.
_GLOBALS = (
    b"cposix\nsystem\n",
    b"cposix\nmkdir\n",
    b"cbuiltins\neval\n",
    b"cbuiltins\nexec\n",
    b"cbuiltins\ngetattr\n",
    b"cbuiltins\nbytearray\n",
    b"cbuiltins\nint\n",
    b"cnumpy\nndarray\n",
    b"cnumpy\ndtype\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n",
    b"c_codecs\nencode\n",
    b"ccollections\nOrderedDict\n",
)


def mutated(rng: random.Random, content: bytes, others: list[bytes], suffix: str) -> bytes:
    """The file with one to four changes; half of them know the format.

    Args:
        content: of a good file.
        others: contents to take pieces from.
        suffix: ".pt", ".pth", ".safetensors" or ".pkl".
    """
    structured = rng.random() < 0.5
    if structured:
        try:
            return _STRUCTURED[suffix](rng, content)
        except (OverflowError, ValueError, TypeError, RuntimeError, struct.error):
            pass  # what cannot be written in this format
    data = bytearray(content)
    for _ in range(rng.randint(1, MAX_CHANGES)):
        rng.choice(_BYTES)(rng, data, others)
    return bytes(data)


def _flip(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    if data:
        data[_place(rng, data)] ^= 1 << rng.randrange(8)


def _overwrite(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    start = _place(rng, data)
    data[start : start + rng.randint(1, 16)] = rng.randbytes(rng.randint(1, 16))


def _number(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    size = rng.choice((1, 2, 4, 8))
    value = rng.choice(_NUMBERS) % 2 ** (8 * size)
    start = _place(rng, data)
    data[start : start + size] = value.to_bytes(size, rng.choice(("little", "big")))


def _cut(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    del data[_place(rng, data) :]


def _remove(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    start = _place(rng, data)
    del data[start : start + rng.choice((1, 2, 8, 100, 4000))]


def _repeat(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    start = _place(rng, data)
    data[start:start] = data[start : start + rng.choice((1, 8, 100, 4000))]


def _zeros(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    start = _place(rng, data)
    size = min(rng.choice((4, 64, 1024)), len(data) - start)
    data[start : start + size] = bytes(size)


def _splice(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    other = rng.choice(others)
    start = _place(rng, other)
    data[_place(rng, data) :] = other[start:]


def _place(rng: random.Random, data: bytes | bytearray) -> int:
    """Anywhere; as often near the beginning or the end, where the structure is."""
    ends = min(len(data), 2000)
    where = rng.randrange(3)
    if where == 0 or not data:
        return rng.randrange(len(data) or 1)
    return rng.randrange(ends) if where == 1 else len(data) - 1 - rng.randrange(ends)


_BYTES: tuple[Callable[[random.Random, bytearray, list[bytes]], None], ...] = (
    _flip, _overwrite, _number, _cut, _remove, _repeat, _zeros, _splice,
)  # fmt: skip


def _mutated_torch_file(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.4:
        loaded = torch.load(io.BytesIO(content), weights_only=False)
        target = io.BytesIO()
        torch.save(_mutated_value(rng, loaded), target,
                   _use_new_zipfile_serialization=rng.random() < 0.8)  # fmt: skip
        return target.getvalue()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    pickled = next(name for name in members if name.endswith("data.pkl"))
    what = rng.randrange(6)
    if what == 0:
        del members[name]
    elif what == 1:
        members[name + rng.choice(("x", "/", "0"))] = members.pop(name)
    elif what == 2:
        members[name] = members[name][: rng.randrange(len(members[name]) + 1)]
    else:
        members[pickled] = _mutated_opcodes(rng, members[pickled])
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", rng.choice((zipfile.ZIP_STORED,) * 9 + (8,))) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return target.getvalue()


def _mutated_pickle(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.5:
        value = _mutated_value(rng, pickle.loads(content))
        return pickle.dumps(value, protocol=rng.randrange(6))
    return _mutated_opcodes(rng, content)


def _mutated_opcodes(rng: random.Random, content: bytes) -> bytes:
    starts = [position for _, _, position in pickletools.genops(content)] + [len(content)]
    pieces = [content[a:b] for a, b in itertools.pairwise(starts)]
    codes = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
    for _ in range(rng.randint(1, MAX_CHANGES)):
        i = rng.randrange(len(pieces))
        what = rng.randrange(7)
        if what == 0:
            del pieces[i]
        elif what == 1:
            pieces.insert(i, rng.choice(pieces))
        elif what == 2:
            j = rng.randrange(len(pieces))
            pieces[i], pieces[j] = pieces[j], pieces[i]
        elif what == 3:
            pieces[i] = rng.choice(codes) + pieces[i][1:]
        elif what == 4:
            pieces[i] = pieces[i][:1] + rng.randbytes(max(0, len(pieces[i]) - 1))
        elif what == 5:
            pieces.insert(i, rng.choice(_GLOBALS))
        else:
            # A call with what may be an argument.
            argument = rng.choice((b"Vfuzz-was-here\n", b"K\x05", b"I99999999999\n", b"N"))
            pieces.insert(i, rng.choice(_GLOBALS) + b"(" + argument + b"tR")
    return b"".join(pieces)


def _mutated_safetensors(rng: random.Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    for _ in range(rng.randint(1, MAX_CHANGES)):
        key = rng.choice(list(header))
        what = rng.randrange(8)
        if what == 0 and len(header) > 1:
            del header[key]
        elif what == 1:
            header[key + "x"] = header.pop(key)
        elif key == "__metadata__":
            field = rng.choice(list(header[key]) or [""])
            header[key][field] = json.dumps(_mutated_value(rng, _parsed(header[key].get(field))))
        elif what == 2:
            header[key]["dtype"] = rng.choice(("F16", "BF16", "F64", "I8", "BOOL", "F8_E4M3", "X"))
        elif what == 3:
            header[key]["shape"] = [rng.choice(_NUMBERS) for _ in range(rng.randrange(5))]
        elif what == 4:
            header[key]["data_offsets"] = [rng.choice(_NUMBERS), rng.choice(_NUMBERS)]
        elif what == 5:
            header[key] = _odd_value(rng)
        else:
            header[key][rng.choice(("dtype", "shape", "data_offsets"))] = _odd_value(rng)
    text = json.dumps(header, default=str).encode()
    size = len(text) if rng.random() < 0.9 else rng.choice(_NUMBERS) % 2**64
    return size.to_bytes(8, "little") + text + rest


def _parsed(text: str | None) -> Any:
    try:
        return json.loads(text or "null")
    except ValueError:
        return text


def _mutated_value(rng: random.Random, value: Any) -> Any:
    """The same nest of containers with one to four places changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, MAX_CHANGES)):
        value = _changed(rng, value)
    return value


def _changed(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        what = rng.randrange(8)
        if what == 0:
            del value[key]
        elif what == 1:
            value[rng.choice((f"{key}x", 5, None, (1, 2), b"k", ""))] = value.pop(key)
        else:
            value[key] = _changed(rng, value[key])
        return value
    if isinstance(value, (list, tuple)) and value and rng.random() < 0.8:
        items = list(value)
        i = rng.randrange(len(items))
        items[i] = _changed(rng, items[i])
        if rng.random() < 0.2:
            items.append(items[i])
        return type(value)(items)
    if isinstance(value, (torch.Tensor, np.ndarray)) and rng.random() < 0.6:
        return _odd_tensor(rng, torch.as_tensor(value).detach())
    return _odd_value(rng)


def _odd_value(rng: random.Random) -> Any:
    if rng.random() < 0.2:
        return rng.choice(_NUMBERS)
    return rng.choice(
        (None, True, -1, 0, 2**70, 1.5, float("nan"), float("inf"), "", "text", "\ud800", b"bytes",
         [], [1, "a"], (), {}, {"a": 1}, {5: None}, set(), 3 + 4j, [[[]]], "9" * 5000)
    )  # fmt: skip


def _odd_tensor(rng: random.Random, tensor: torch.Tensor) -> Any:
    makers: tuple[Callable[[], Any], ...] = (
        lambda: tensor.double(),
        lambda: tensor.half(),
        lambda: tensor.bfloat16(),
        lambda: tensor.to(torch.int8),
        lambda: tensor.bool(),
        lambda: tensor.to(torch.complex64),
        lambda: tensor.to(torch.float8_e4m3fn),
        lambda: tensor.float().fill_(float("nan")),
        lambda: tensor.flatten(),
        lambda: tensor[None],
        lambda: tensor.flatten()[:0],
        lambda: tensor.flatten()[:1].expand(10**6),
        lambda: torch.tensor(1.0),
        lambda: tensor.transpose(0, -1) if tensor.dim() else tensor,
        lambda: tensor.to_sparse(),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        lambda: torch.empty_like(tensor, device="meta"),
        lambda: torch.nn.Parameter(tensor.float()),
        lambda: tensor.float().numpy(),
        lambda: np.array(["a", "b"]),
        lambda: np.array([None, 1], dtype=object),
        lambda: np.zeros(2, [("a", "i4")]),
        lambda: np.float32(1),
        lambda: np.datetime64("2020-01-01"),
        lambda: tensor.float().numpy().astype(">f4"),
        lambda: np.zeros(4, np.uint64),
        lambda: np.zeros(4, np.longdouble),
    )
    return rng.choice(makers)()


_STRUCTURED: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".pt": _mutated_torch_file,
    ".pth": _mutated_torch_file,
    ".pkl": _mutated_pickle,
    ".safetensors": _mutated_safetensors,
}
