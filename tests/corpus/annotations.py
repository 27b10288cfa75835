"""Faulty annotation files."""

from .case import HANDLED, OWN, REFUSED, SIZE, Case, World

W, H = SIZE
NAN, INFINITY = float("nan"), float("inf")


def _text(content: str, encoding: str = "utf-8"):
    return lambda world: world.json.write_text(content, encoding)


def _set(**values):
    return lambda world: world.annotation.update(values)


def _drop(*keys):
    return lambda world: [world.annotation.pop(key) for key in keys]


def _image(**values):
    return lambda world: world.image_entry.update(values)


def _list(name: str, content: list):
    return lambda world: world.coco[world.split].update({name: content})


def _add(name: str, make):
    return lambda world: world.coco[world.split][name].append(make(world))


def _rle(counts, size=(H, W), **values):
    return _set(segmentation={"size": list(size), "counts": counts}, **values)


def _truncated(world: World) -> None:
    world.write_json()
    text = world.json.read_text()
    world.json.write_text(text[: len(text) // 2])


def _with_bom(world: World) -> None:
    world.write_json()
    world.json.write_text(world.json.read_text(), "utf-8-sig")


def _every(split: str, **values):
    def spoil(world: World) -> None:
        for annotation in world.coco[split]["annotations"]:
            annotation.update(values)

    return spoil


def _without_optional_fields(world: World) -> None:
    for coco in world.coco.values():
        coco["annotations"].pop()  # the crowd
        for annotation in coco["annotations"]:
            del annotation["area"], annotation["iscrowd"]


def _bitmask(world: World) -> None:
    _rle([100, 200, W * H - 300])(world)
    rest = world.coco["train"]["annotations"]
    world.coco["train"]["annotations"] = rest[:1] + rest[-1:]
    world.opts += ["INPUT.MASK_FORMAT", "bitmask"]


FILES = [
    Case("truncated JSON", "cut in the middle", _truncated, REFUSED, ("is not a JSON file",)),
    Case("byte order mark", "saved by an editor for Windows", _with_bom, REFUSED,
         ("begins with a byte order mark (BOM)", "tail -c +4")),
    Case("empty JSON", "a file of no bytes", _text(""), REFUSED, ("is not a JSON file",)),
    Case("web page", "an HTML error page", _text("<html>404"), REFUSED, ("is not a JSON file",)),
    Case(
        "other encoding",
        "JSON in UTF-16",
        _text('{"images": []}', "utf-16"),
        REFUSED,
        ("is not a JSON file",),
    ),
    Case(
        "deep nesting",
        "100,000 opening brackets",
        _text("[" * 100_000),
        REFUSED,
        ("is not a JSON file",),
    ),
    Case("not COCO", "a JSON list", _text("[1, 2]"), REFUSED, ("is not COCO", "no list")),
    Case(
        "no annotations",
        "image entries and categories only",
        lambda world: world.coco["train"].pop("annotations"),
        REFUSED,
        ("is not COCO", "no list 'annotations'"),
    ),
    Case("JSON is a folder", "a folder of that name", lambda w: w.json.mkdir(), REFUSED,
         ("train.json",)),
    Case(
        "missing JSON",
        "a path that does not exist",
        lambda world: world.coco.pop("train"),
        REFUSED,
        ("train.json",),
    ),
    Case("0 images", '"images": []', _list("images", []), REFUSED, ("no images at all",)),
    Case(
        "0 annotations",
        '"annotations": []',
        _list("annotations", []),
        REFUSED,
        ("no annotations at all",),
    ),
    Case("0 categories", '"categories": []', _list("categories", []), REFUSED, ("categor",)),
    Case(
        "all crowd",
        "iscrowd 1 everywhere",
        _every("train", iscrowd=1),
        REFUSED,
        ("no annotation that could be learned from",),
    ),
    Case(
        "nothing of any size",
        "every box has width 0",
        _every("train", bbox=[5, 5, 0, 9]),
        REFUSED,
        ("no annotation that could be learned from",),
    ),
    Case("validation all crowd", "iscrowd 1 everywhere", _every("val", iscrowd=1), HANDLED),
    Case(
        "other categories",
        "training and validation name their classes differently",
        lambda world: world.coco["val"]["categories"][1].update(name="cow"),
        REFUSED,
        ("different categories", "number 2", "'cow'", "'dog'"),
    ),
]  # fmt: skip

ENTRIES = [
    Case(
        "dangling image",
        "an annotation of image 99",
        _set(image_id=99),
        HANDLED,
        ("1 annotations of an image that the JSON lacks (not used)", "image 99"),
    ),
    Case(
        "dangling category",
        "category 99",
        _set(category_id=99),
        REFUSED,
        ("a category that the JSON lacks", "'0.jpg' image 1 annotation 1", "category 99"),
    ),
    Case(
        "duplicate annotation id",
        "two annotations of id 2",
        _set(id=2),
        REFUSED,
        ("duplicate ids", "annotation 2"),
    ),
    Case(
        "duplicate image id",
        "two images of id 1",
        _add("images", lambda world: dict(world.image_entry)),
        REFUSED,
        ("duplicate ids", "'0.jpg' image 1"),
    ),
    Case(
        "duplicate category id",
        "two categories of id 1",
        _add("categories", lambda world: {"id": 1, "name": "cow"}),
        REFUSED,
        ("categor",),
    ),
    Case(
        "huge id",
        "an image id of 31 digits",
        _image(id=10**30),
        REFUSED,
        ("malformed", "without a whole 'id'"),
    ),
    Case(
        "id as text",
        '"image_id": "1"',
        _set(image_id="1"),
        REFUSED,
        ("malformed", "annotation 1", "without a whole 'image_id'"),
    ),
    Case(
        "category id as text",
        '"category_id": "1"',
        _set(category_id="1"),
        REFUSED,
        ("malformed", "annotation 1", "'category_id'"),
    ),
    Case(
        "missing size",
        "an image entry without width and height",
        lambda world: [world.image_entry.pop(key) for key in ("width", "height")],
        REFUSED,
        ("malformed", "'0.jpg' image 1", "without 'width' and 'height'"),
    ),
    Case(
        "size as text",
        f'"width": "{W}"',
        _image(width=str(W)),
        REFUSED,
        ("malformed", "'0.jpg' image 1", "without 'width' and 'height'"),
    ),
    Case(
        "image as text",
        "a file name instead of an entry",
        _add("images", lambda world: "0.jpg"),
        REFUSED,
        ("malformed", "entry 4 of 'images'"),
    ),
    Case(
        "category without name",
        "only an id",
        lambda world: world.coco[world.split]["categories"][0].pop("name"),
        REFUSED,
        ("malformed", "entry 0 of 'categories'"),
    ),
    Case(
        "unused category",
        "a third category in both files",
        lambda world: [c["categories"].append({"id": 3, "name": "cow"})
                       for c in world.coco.values()],
        HANDLED,
        ("1 categories without an annotation", "category 3"),
        ways=(OWN,),
    ),
    Case(
        "same name",
        "both categories are cats",
        lambda world: [c["categories"][1].update(name="cat") for c in world.coco.values()],
        HANDLED,
        ("1 categories that bear another one's name", "cat"),
    ),
    Case(
        "same file",
        "two entries of one file",
        _add("images", lambda world: world.image_entry | {"id": 77}),
        HANDLED,
        ("1 image entries that name a file again", "'0.jpg' image 77"),
    ),
    Case(
        "NUL in a file name",
        "a NUL character in file_name",
        _image(file_name="a\0b.jpg"),
        REFUSED,
        ("images that", "a\\x00b.jpg"),
    ),
    Case(
        "half a character in a file name",
        "a lone surrogate in file_name",
        _image(file_name="\ud800.jpg"),
        REFUSED,
        ("images that", "\\ud800.jpg"),
    ),
    Case(
        "iscrowd as text",
        '"iscrowd": "no"',
        _set(iscrowd="no"),
        REFUSED,
        ("malformed", "annotation 1", "iscrowd 'no'"),
    ),
    Case("ignore", '"ignore": 1', _set(ignore=1), REFUSED, ('"ignore"', "annotation 1")),
    Case(
        "area as text",
        '"area": "big"',
        _set(area="big"),
        REFUSED,
        ("malformed", "annotation 1", "area 'big'"),
    ),
    Case(
        "negative area",
        '"area": -5',
        _set(area=-5),
        REFUSED,
        ("malformed", "annotation 1", "area -5"),
    ),
    Case(
        "no area, no iscrowd",
        "as some annotation tools leave them out",
        _without_optional_fields,
        HANDLED,
    ),
    Case(
        "areas of 0",
        '"area": 0 everywhere, as some annotation tools write it',
        lambda world: [a.update(area=0) for a in world.coco[world.split]["annotations"]],
        HANDLED,
    ),
    Case(
        "keypoints of two numbers",
        '"keypoints": [1, 2]',
        _set(keypoints=[1, 2]),
        REFUSED,
        ("malformed", "annotation 1", "keypoints"),
    ),
]  # fmt: skip

BOXES = [
    Case("box of NaN", "[5, NaN, 9, 9]", _set(bbox=[5, NAN, 9, 9]), REFUSED,
         ("malformed", "'0.jpg' image 1 annotation 1", "bbox [5, nan, 9, 9]")),
    Case("infinite box", "[5, 5, Infinity, 9]", _set(bbox=[5, 5, INFINITY, 9]), REFUSED,
         ("malformed", "annotation 1", "bbox")),
    Case("astronomic box", "[0, 0, 1e30, 9]", _set(bbox=[0, 0, 1e30, 9]), REFUSED,
         ("malformed", "annotation 1", "bbox")),
    Case("huge box", "[0, 0, 1000000, 1000000]", _set(bbox=[0, 0, 10**6, 10**6]), HANDLED,
         ("1 boxes partly outside their image (cut off at its edge)", "annotation 1")),
    Case("negative box", "[50, 5, -9, 10]", _set(bbox=[50, 5, -9, 10]), REFUSED,
         ("malformed", "annotation 1", "negative size")),
    Case("box of no size", "[5, 5, 0, 10]", _set(bbox=[5, 5, 0, 10]), HANDLED,
         ("1 objects of zero area (not learned from)", "annotation 1")),
    Case("box elsewhere", "[5000, 5, 10, 10]", _set(bbox=[5000, 5, 10, 10]), HANDLED,
         ("1 boxes wholly outside their image (not learned from)", "annotation 1")),
    Case("box of three numbers", "[5, 5, 9]", _set(bbox=[5, 5, 9]), REFUSED,
         ("malformed", "annotation 1", "bbox")),
    Case("box as text", '["5", "5", "9", "9"]', _set(bbox=["5", "5", "9", "9"]), REFUSED,
         ("malformed", "annotation 1", "bbox")),
    Case("no box", "an annotation without bbox", _drop("bbox"), REFUSED,
         ("malformed", "annotation 1", "bbox None")),
]  # fmt: skip

MASKS = [
    Case("no mask", '"segmentation": []', _set(segmentation=[]), REFUSED,
         ("without a mask (set MODEL.MASK_ON False", "annotation 1")),
    Case("empty polygon", '"segmentation": [[]]', _set(segmentation=[[]]), HANDLED,
         ("1 masks without a polygon of three points (not used)", "annotation 1")),
    Case("polygon of one point", "[[5, 5]]", _set(segmentation=[[5, 5]]), HANDLED,
         ("1 masks without a polygon of three points (not used)", "annotation 1")),
    Case("polygon of two points", "[[5, 5, 9, 9]]", _set(segmentation=[[5, 5, 9, 9]]), HANDLED,
         ("1 masks without a polygon of three points (not used)", "annotation 1")),
    Case("odd polygon", "seven numbers", _set(segmentation=[[5, 5, 9, 9, 5, 9, 1]]), HANDLED,
         ("1 masks without a polygon of three points (not used)", "annotation 1")),
    Case("a good part and a point", "a triangle and [5, 5]",
         _set(segmentation=[[5, 5, 30, 5, 5, 30], [5, 5]]), HANDLED,
         ("1 parts of a mask that are no polygon", "annotation 1 (number 2 of 2)")),
    Case("flat polygon", "three points on a line", _set(segmentation=[[5, 5, 9, 9, 7, 7]]),
         HANDLED),
    Case("polygon of NaN", "NaN for one number", _set(segmentation=[[5, 5, NAN, 9, 5, 9]]),
         REFUSED, ("malformed", "annotation 1", "a polygon has values that are no numbers")),
    Case("far polygon", "a point at 1e9", _set(segmentation=[[5, 5, 1e9, 9, 5, 9]]), REFUSED,
         ("malformed", "annotation 1", "a polygon lies far outside the image")),
    Case("polygon as text", "letters for numbers", _set(segmentation=[["a"] * 6]), REFUSED,
         ("malformed", "annotation 1", "no numbers")),
    Case("mask as a number", '"segmentation": 7', _set(segmentation=7), REFUSED,
         ("malformed", "annotation 1", "neither polygons nor RLE")),
    Case("RLE instead of polygons", "a good RLE under INPUT.MASK_FORMAT polygon",
         _rle([100, 200, W * H - 300]), REFUSED,
         ("masks as RLE (set INPUT.MASK_FORMAT bitmask)", "annotation 1")),
    Case("RLE where it belongs", "a good RLE under INPUT.MASK_FORMAT bitmask", _bitmask, HANDLED),
    Case("RLE of another size", "size [5, 5]", _rle([25], size=(5, 5)), REFUSED,
         ("malformed", "annotation 1", "RLE of size [5, 5]")),
    Case("RLE too long", "runs of more pixels than the image has", _rle([100, 10**9]), REFUSED,
         ("malformed", "annotation 1", "RLE of 1000000100 pixels")),
    Case("RLE too short", "runs of fewer pixels", _rle([100, 200]), REFUSED,
         ("malformed", "annotation 1", "RLE of 300 pixels")),
    Case("negative RLE", "a run of -100", _rle([-100, W * H + 100]), REFUSED,
         ("malformed", "annotation 1", "not whole numbers of 0 or more")),
    Case("damaged RLE", "compressed counts cut in a number", _rle("oooo"), REFUSED,
         ("malformed", "annotation 1", "damaged")),
    Case("RLE of other letters", "counts in Chinese", _rle("一二三"), REFUSED,
         ("malformed", "annotation 1", "damaged")),
    Case("RLE without counts", "a size only", _set(segmentation={"size": [H, W]}), REFUSED,
         ("malformed", "annotation 1", "without 'counts'")),
    Case("damaged RLE of a crowd", "runs of more pixels than the image has",
         _rle([5, 10**8], iscrowd=1), REFUSED, ("malformed", "annotation 1", "RLE of")),
]  # fmt: skip

# Of the cases above, those that come to something else where they are in the validation set.
_ELSE_IN_VALIDATION: dict[str, tuple[str, tuple[str, ...]] | None] = {
    "image as text": (REFUSED, ("malformed", "entry 2 of 'images'")),
    "no area, no iscrowd": None,  # in both files already
    "unused category": None,
    "same name": None,
    "RLE instead of polygons": (HANDLED, ()),
    "RLE where it belongs": None,
}


def _in_validation(case: Case) -> Case:
    def spoil(world: World) -> None:
        world.split = "val"
        case.spoil(world)

    outcome, says = _ELSE_IN_VALIDATION.get(case.name) or (case.outcome, case.says)
    name = f"{case.name}, validation"
    return Case(name, case.how, spoil, outcome, says, (OWN,))


VALIDATION = [
    _in_validation(case)
    for case in ENTRIES + BOXES + MASKS
    if _ELSE_IN_VALIDATION.get(case.name, ()) is not None
]

CASES = FILES + ENTRIES + BOXES + MASKS
