"""Read files that a coverage-guided fuzzer makes: tensors, annotations and checkpoints.

    pip install atheris
    python -m tools.fuzz_readers FOLDER -max_total_time=600

FOLDER collects the inputs that reach new code; it begins with valid ones. The other options are libFuzzer's. An error
that is not of one line naming the file ends the run, with its input in a file `crash-...`.
"""

import pickle
import sys
import tempfile
from pathlib import Path

import atheris
import numpy as np
import torch

with atheris.instrument_imports(include=["fastdet", "pickletools", "zipfile"]):
    from fastdet.data import VOC, DataError
    from fastdet.engine import CheckpointError, load_model
    from fastdet.weights.files import TensorFileError, read, write_state_dict

ANNOTATION = b"""<annotation><filename>one.png</filename><size><width>9</width><height>9</height></size><object>
<name>a</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></object></annotation>"""
WORK = Path(tempfile.mkdtemp())


def write_seeds(folder: Path) -> None:
    """A valid file for each reader, after the byte that chooses it."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1)}
    checkpoint = {"architecture": {"backbone": "small", "num_classes": 2}, "class_names": ["x"], "model": state}
    torch.save(state, WORK / "new")
    torch.save(state, WORK / "old", _use_new_zipfile_serialization=False)
    torch.save(checkpoint, WORK / "checkpoint")
    write_state_dict(WORK / "w.safetensors", state)
    (WORK / "arrays").write_bytes(pickle.dumps({"a": np.zeros((2, 3), np.float32)}, 2))
    seeds = [(0, "new"), (0, "old"), (0, "w.safetensors"), (0, "arrays"), (2, "checkpoint")]
    for reader, name in seeds:
        (folder / f"seed-{name}").write_bytes(bytes([reader]) + (WORK / name).read_bytes())
    (folder / "seed-annotation").write_bytes(b"\1" + ANNOTATION)


def read_one(data: bytes) -> None:
    reader, content = data[0] % 3 if data else 0, data[1:]
    path = WORK / ("Annotations/one.xml" if reader == 1 else "file")
    path.write_bytes(content)
    try:
        if reader == 0:
            read(path)
        elif reader == 1:
            VOC(WORK, "train")
        else:
            load_model(path)
    except (TensorFileError, DataError, CheckpointError) as error:
        if "\n" in str(error) or str(WORK) not in str(error) or len(str(error)) > 2000:
            raise


def main() -> None:
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (WORK / folder).mkdir(parents=True)
    (WORK / "ImageSets/Main/train.txt").write_text("one\n")
    (WORK / "JPEGImages/one.png").write_bytes(b"")
    write_seeds(Path(sys.argv[1]))
    torch.set_num_threads(1)
    atheris.Setup(sys.argv, read_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
