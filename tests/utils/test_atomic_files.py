"""Whether a file can be written is known before the work."""

import os

import pytest

from rope_vit_det.errors import InputError
from rope_vit_det.utils.atomic_files import check_folder, check_new_file


def test_where_a_file_can_go(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("x")
    check_new_file(tmp_path / "new" / "deep" / "a.json")
    check_new_file(file, force=True)
    for path, words in (
        (tmp_path, "is a folder"),
        (file, "is there already"),
        (file / "a.json", "file is no folder"),
        (file / "b" / "a.json", "file is no folder"),
    ):
        with pytest.raises(InputError, match=words):
            check_new_file(path)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(InputError, match=f"b cannot be written: {tmp_path} is read-only"):
        check_folder(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == ["file"]
