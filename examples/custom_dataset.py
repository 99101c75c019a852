"""Evaluate a model on a dataset of your own: a name, the sequences, and a function that reads one of them.

    python examples/custom_dataset.py

Here a sequence is rendered. A real reader opens files, and leaves None in `Sample` what the dataset does not know.
"""

from page4d import Page4D
from page4d.data.sample import Sample
from page4d.data.synthetic import SyntheticScenes
from page4d.evaluation import Dataset, Protocol, evaluate
from page4d.evaluation.report import table

SIZE = (56, 84)  # height and width that the bundled weights were trained at
scenes = SyntheticScenes("dynamic", frames=4, size=SIZE, seed=1)


def read(sequence: str) -> Sample:
    """Images (S, 3, H, W) in [0, 1], OpenCV cameras, depth along z, and a name."""
    sample = scenes[int(sequence)]
    return Sample(sample.images, sample.extrinsics, sample.intrinsics, depth=sample.depth, valid=sample.valid, name=f"scene-{sequence}")


dataset = Dataset("mine", sequences=("0", "1"), read=read)
model = Page4D.from_pretrained("nano", device="cpu")
print(table({"mine": evaluate(model, dataset, {"pose", "depth"}, protocol=Protocol(SIZE), rules=dataset.rules)}))
