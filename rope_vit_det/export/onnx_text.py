"""Parts of ONNX graphs, in the notation of `onnx.parser`."""

DOMAIN = "rope_vit_det"
# In front of a graph. ONNX has no assertions: what is wrong makes a shape of too many elements.
# (An index out of bounds is an error to ONNX Runtime, but not to OpenVINO.)
CHECK = """
    multiples = Constant <value_ints = {multiples}> ()
    shape = Shape ({image})
    rest = Mod (shape, multiples)
    same = Add (shape, rest)
    {refusal} = Reshape ({image}, same)"""
KEEP = """
    checked_{image} = Identity ({refusal})"""
# What lies beyond the size and its multiple is cut off.
CUT = """
    one = Constant <value_ints = [1]> ()
    axes = Constant <value_ints = [1, 2]> ()
    sides = Gather (shape, axes)
    below = Less (size, one)
    above = Greater (size, sides)
    either = Or (below, above)
    wrong = Cast <to = 7> (either)
    surplus = ReduceSum (wrong)
    elements = Add (shape, surplus)
    size_must_be_that_of_a_part_of_the_image = Reshape ({refusal}, elements)
    checked_size = Identity (size)
    step = Constant <value_ints = [{step}]> ()
    negative = Neg (size)
    missing = Mod (negative, step)
    end = Add (size, missing)
    start = Constant <value_ints = [0, 0]> ()
    checked_image = Slice (size_must_be_that_of_a_part_of_the_image, start, end, axes)"""
# Bicubic as torch has it. ONNX Runtime's own Resize takes 1.7 s for the position table of a ViT-B
# at 1024 px, two products with the matrices that Resize makes of unit matrices 3 ms.
_RESIZE_BICUBIC = """
<opset_import: ["": 20], domain: "rope_vit_det">
ResizeBicubic (image, size) => (resized) {
    one = Constant <value_ints = [1]> ()
    first = Constant <value_ints = [0, 1]> ()
    rows = Shape <start = 2, end = 3> (image)
    columns = Shape <start = 3> (image)
    images, channels, new_rows, new_columns = Split <axis = 0, num_outputs = 4> (size)
    row_square = Concat <axis = 0> (rows, rows)
    row_zeros = ConstantOfShape (row_square)
    row_unit = EyeLike (row_zeros)
    row_image = Unsqueeze (row_unit, first)
    row_size = Concat <axis = 0> (one, one, new_rows, rows)
    left = Resize <mode = "cubic", cubic_coeff_a = -0.75> (row_image, , , row_size)
    column_square = Concat <axis = 0> (columns, columns)
    column_zeros = ConstantOfShape (column_square)
    column_unit = EyeLike (column_zeros)
    column_image = Unsqueeze (column_unit, first)
    column_size = Concat <axis = 0> (one, one, columns, new_columns)
    right = Resize <mode = "cubic", cubic_coeff_a = -0.75> (column_image, , , column_size)
    higher = MatMul (left, image)
    resized = MatMul (higher, right)
}"""
# Detectron2's `heatmaps_to_keypoints`: each heatmap is enlarged to the size of its own box.
_FIND_KEYPOINTS = """
<opset_import: ["": 20, "rope_vit_det": 1], domain: "rope_vit_det">
FindKeypoints (heatmaps, boxes) => (keypoints) {
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    three = Constant <value_ints = [3]> ()
    rest = Constant <value_ints = [-1]> ()
    reversed = Constant <value_ints = [1, 0]> ()
    half = Constant <value_float = 0.5> ()
    yes = Constant <value = bool {1}> ()
    start, end = Split <axis = 1, num_outputs = 2> (boxes)
    least = CastLike (one, boxes)
    difference = Sub (end, start)
    sides = Max (difference, least)
    pixels = Ceil (sides)
    steps = Div (sides, pixels)
    shape = Shape <start = 0, end = 2> (heatmaps)
    number, joints = Split <num_outputs = 2> (shape)
    flat = Concat <axis = 0> (joints, rest)
    places = Loop (number, yes) <body = find (int64 i, bool go) => (bool go_on, float[K, 3] found) {
        go_on = Identity (go)
        at = Unsqueeze (i, zero)
        width_height = Gather (pixels, i)
        step = Gather (steps, at)
        corner = Gather (start, at)
        heatmap = Gather (heatmaps, at)
        whole = Cast <to = 7> (width_height)
        height_width = Gather (whole, reversed)
        width = Gather (whole, zero)
        size = Concat <axis = 0> (one, joints, height_width)
        large = rope_vit_det.ResizeBicubic (heatmap, size)
        logits = Reshape (large, flat)
        best = ReduceMax (logits, one)
        place = ArgMax <axis = 1> (logits)
        x = Mod (place, width)
        y = Div (place, width)
        xy = Concat <axis = 1> (x, y)
        cells = CastLike (xy, half)
        centers = Add (cells, half)
        inside = Mul (centers, step)
        placed = Add (inside, corner)
        small = Reshape (heatmap, flat)
        below = Sub (small, best)
        parts = Exp (below)
        sum = ReduceSum (parts, one)
        score = Reciprocal (sum)
        found = Concat <axis = 1> (placed, score)
    }>
    all = Concat <axis = 0> (shape, three)
    keypoints = Reshape (places, all)
}"""
FUNCTIONS = (_RESIZE_BICUBIC, _FIND_KEYPOINTS)
