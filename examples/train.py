"""Trains lenet5 or convnet on an ImageFolder of digits with PyTorch-Ignite, and saves a plain state_dict.

    python examples/train.py --arch lenet5 [--data build/digits] [--epochs N] [--output build/lenet5.pth] [--logs build/runs]

The images go through `deploy.artifact.preprocess`, so that training sees the same pixels as `deploy eval`. TensorBoard logs of
loss, learning rate and accuracy go to LOGS/ARCH. The same seed on the same machine gives the same weights.
"""

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import TensorboardLogger
from ignite.metrics import Accuracy, Loss
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from deploy.artifact.preprocess import preset
from deploy.calibration.imagefolder import ImageFolder, batches, scan
from deploy.models import registry

EPOCHS = {"lenet5": 20, "convnet": 12}
BATCH = 64
PEAK_RATE = {"lenet5": 4e-3, "convnet": 2e-3}


def read(folder: ImageFolder) -> tuple[Tensor, Tensor]:
    """All images, (N, 1, 28, 28) float32, and their labels, (N,) int64."""
    images, labels = zip(*batches(folder.samples, preset("mnist", (28, 28)).open, 256), strict=True)
    return torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels))


def jitter(images: Tensor, background: float) -> Tensor:
    """Each image turned by up to 12 degrees, scaled by up to 12 % and shifted by up to 2 pixels, at random."""
    count, _, height, width = images.shape
    angle = (torch.rand(count) * 2 - 1) * math.radians(12)
    scale = 1 + (torch.rand(count) * 2 - 1) * 0.12
    shift = (torch.rand(count, 2) * 2 - 1) * 2 * 2 / torch.tensor([width, height])
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    affine = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
    # The new pixels at the edges are background, not 0, which is a grey after normalization.
    return functional.grid_sample(images - background, grid, align_corners=False) + background


def train(arch: str, data: Path, epochs: int, output: Path, logs: Path, seed: int) -> float:
    """Train, save the state_dict to `output`, and return the accuracy on the eval split, 0 to 1."""
    torch.manual_seed(seed)
    folders = {split: scan(data / split) for split in ("train", "eval")}
    images, labels = read(folders["train"])
    background = float(images.min())
    model = registry.create(arch, num_classes=len(folders["train"].classes))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    loader = DataLoader(TensorDataset(images, labels), batch_size=BATCH, shuffle=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE[arch], total_steps=epochs * len(loader))

    def prepare(batch: tuple[Tensor, Tensor], device: object, non_blocking: bool) -> tuple[Tensor, Tensor]:
        return jitter(batch[0], background), batch[1]

    trainer = create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss(label_smoothing=0.05), prepare_batch=prepare)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: schedule.step())
    evaluator = create_supervised_evaluator(model, metrics={"accuracy": Accuracy(), "loss": Loss(nn.CrossEntropyLoss())})
    scoring = DataLoader(TensorDataset(*read(folders["eval"])), batch_size=500)
    every = Events.EPOCH_COMPLETED(event_filter=lambda _, epoch: epoch % 5 == 0 or epoch == epochs)

    @trainer.on(every)
    def score() -> None:
        evaluator.run(scoring)
        metrics = evaluator.state.metrics
        print(f"{arch}: epoch {trainer.state.epoch}/{epochs}, accuracy {100 * metrics['accuracy']:.2f} %", flush=True)

    with TensorboardLogger(log_dir=str(logs / arch)) as board:
        board.attach_output_handler(
            trainer, Events.ITERATION_COMPLETED(every=20), "train", output_transform=lambda x: {"loss": x}
        )
        board.attach_opt_params_handler(trainer, Events.ITERATION_COMPLETED(every=20), optimizer)
        board.attach_output_handler(
            evaluator, Events.COMPLETED, "eval", metric_names="all", global_step_transform=lambda *_: trainer.state.iteration
        )
        trainer.run(loader, max_epochs=epochs)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    torch.save(model.state_dict(), partial)
    os.replace(partial, output)
    return float(evaluator.state.metrics["accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=EPOCHS, default="lenet5", help="default: %(default)s")
    parser.add_argument(
        "--data", type=Path, default=Path("build/digits"), help="folder with train/ and eval/; default: %(default)s"
    )
    parser.add_argument("--epochs", type=int, help=f"default: {', '.join(f'{n} for {arch}' for arch, n in EPOCHS.items())}")
    parser.add_argument("--output", type=Path, help="default: build/ARCH.pth")
    parser.add_argument("--logs", type=Path, default=Path("build/runs"), help="TensorBoard logs; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args()
    # Batches this small gain little from a second thread, and lose much to it on shared cores.
    torch.set_num_threads(1)
    output = options.output or Path("build", f"{options.arch}.pth")
    start = time.perf_counter()
    accuracy = train(options.arch, options.data, options.epochs or EPOCHS[options.arch], output, options.logs, options.seed)
    print(f"{output}: {100 * accuracy:.2f} % of the eval images, in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
