"""The variants whose weights are tracked in `weights/`, each in one format: all formats would be 600 MB."""

from pathlib import Path

from emotion.inference.model_folder import find_formats, names_to_serve
from emotion.utils.recipe import RECIPE_FILE

# Variant -> its format. ONNX is the fastest for one text, and the browser's; the baseline comes in half the bytes of
# FP32, and QLoRA as it was trained, in 4 bits with the adapter beside it.
RELEASED = {
    "baseline": "bf16",
    "ptq": "onnx",
    "qat": "onnx",
    "qat-int4": "onnx",
    "qat-int2": "onnx",
    "qlora": "nf4",
}
RECOMMENDED = "qat-int4"  # the best file of QAT on validation; a seventh of FP32
# The baseline's file gets the name that `from_pretrained` opens. config.json makes it compute in float32: in bfloat16
# two labels of 2,000 differ on another processor, and macro F1 by 0.2 points.
RENAMED = {"model.bf16.safetensors": "model.safetensors"}
OPENED_AS = {"baseline": "pytorch"}
SCORES_OF_OPENED = "released"  # folder of the results with the record of what is opened in another format
LICENSE_FILE = "LICENSE"  # of the weights, which have their encoder's, not that of the code
BYTES_OF_FILE, BYTES_IN_ALL = 50 * 10**6, 150 * 10**6  # upper bounds for a clone


def names_to_release(folder: Path, variant: str) -> dict[str, str]:
    """The files of a model folder that are released, without the license: name there -> name in the released folder.

    Raises:
        UserError: if the folder does not have the format that is released of its variant.
    """
    folder, format = Path(folder), RELEASED[variant]
    names = names_to_serve(folder, find_formats(folder)[format], format)
    for path in sorted((folder / "adapter").glob("adapter_*")):  # QLoRA's
        names.append(path.relative_to(folder).as_posix())
    return {name: RENAMED.get(name, name) for name in [*names, RECIPE_FILE]}
