"""Every faulty input of the corpus has the outcome that docs/faulty_inputs.md says."""

import pytest

from corpus.case import FUNCTION, HANDLED, OWN, REFUSED, REGISTERED
from corpus.run import run_case
from corpus.table import CASES, DOC, table

BY_NAME = {case.name: case for case in CASES}
QUICK = [
    ("dangling image", OWN),
    ("damaged RLE", REGISTERED),
    ("far polygon", OWN),
    ("damaged PNG", REGISTERED),
    ("16 bits", OWN),
    ("skipped on demand", OWN),
    ("yaml that executes", OWN),
    ("weights with NaN", OWN),
    ("dangling category, validation", OWN),
    ("category out of range, function", FUNCTION),
    ("no bbox_mode, function", FUNCTION),
]
FRESH = ["truncated JSON", "truncated JPEG", "CMYK", "yaml that evaluates", "pickle that executes"]


def _check(case, way, folder, **options):
    outcome = run_case(case, way, folder, **options)
    assert outcome.kind == case.outcome, outcome.log[-3000:]
    told = outcome.line if case.outcome == REFUSED else outcome.log
    at = 0
    for part in case.says:
        at = told.find(part, at)
        assert at >= 0, (part, told[-3000:])
    if case.outcome == HANDLED:
        assert (folder / "out" / "model_final.pth").exists()
    return outcome


@pytest.mark.parametrize(("name", "way"), QUICK)
def test_some_of_the_corpus(tmp_path, name, way):
    _check(BY_NAME[name], way, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "way"), [(case, way) for case in CASES for way in case.ways],
                         ids=lambda value: getattr(value, "name", value))  # fmt: skip
def test_the_whole_corpus(tmp_path, case, way):
    _check(case, way, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", FRESH)
def test_a_fresh_process_has_the_same_outcome(tmp_path, name):
    _check(BY_NAME[name], OWN, tmp_path / "run", fresh=True)


def test_what_is_skipped_is_listed(tmp_path):
    _check(BY_NAME["skipped on demand"], OWN, tmp_path / "run")
    listed = (tmp_path / "run" / "out" / "skipped_images_own_train.txt").read_text()
    assert [line.split(": ")[0] for line in listed.splitlines()] == ["train/0.jpg", "train/1.jpg"]


def test_the_corpus_is_large_and_of_every_kind():
    assert len(CASES) == len(BY_NAME) >= 60
    assert {case.outcome for case in CASES} == {HANDLED, REFUSED}


def test_the_document_is_current():
    assert DOC.read_text("utf-8") == table()
