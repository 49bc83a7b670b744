"""Fine-tunes a classifier on pictures of your own: a lesson to read from top to bottom, and to change.

    python examples/finetune.py photographs --arch torchvision:resnet34 --weights resnet34.pth --freeze conv1 bn1 layer1

PICTURES holds train/ and val/ (or eval/), each with a folder of images for each class; or the folders of the classes alone, of
which a fifth is then held out. OUT gets best.pth, the state_dict of the best epoch; last.pt, from which --resume goes on;
classes.txt, preprocess.json, and logs/ for TensorBoard. It ends with the `deploy export` that fits, and shares its options.
"""

import argparse
import io
import json
import logging
import math
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import ProgressBar, TensorboardLogger
from ignite.handlers.tensorboard_logger import WeightsHistHandler
from ignite.metrics import Accuracy, Loss
from pictures import AUGMENTATIONS, Pictures, check, find
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.utils import make_grid

from deploy.artifact.preprocess import Preprocess
from deploy.errors import DeployError, UsageError
from deploy.finetune import freeze, replace_head
from deploy.intake.build import build_model
from deploy.intake.model_args import parse_model_args
from deploy.pipeline.export_interface import default_preprocess, input_specs, load_preprocess

OPTIMIZERS: dict[str, tuple[Any, float, dict[str, float]]] = {
    "adamw": (torch.optim.AdamW, 1e-3, {"weight_decay": 0.02}),
    "sgd": (torch.optim.SGD, 1e-2, {"weight_decay": 1e-4, "momentum": 0.9}),
}


# 1. The net: trained weights, a new head, frozen layers


def build(options: argparse.Namespace, classes: int) -> tuple[nn.Module, Preprocess, str]:
    """The net with a head of so many classes, what it takes of a picture, and its input as in `deploy export --input`."""
    net: dict[str, Any] = {"arch": options.arch, "model": options.model, "args": parse_model_args(options.model_arg)}
    built, _ = build_model(**net, num_classes=classes, seed=options.seed)
    spec, *others = specs = input_specs([options.input] if options.input else [], built, static_batch=True)
    preprocess = load_preprocess(options.preprocess, specs) or default_preprocess(built, specs)
    if preprocess is None or preprocess.size is None or preprocess.layout != "chw" or others:
        raise UsageError(f"say how an image becomes {spec}, the only input: --preprocess imagenet, or a JSON file with a crop")
    module = built.module
    if options.weights is None:
        print("without --weights every layer begins with random numbers, and a frozen one keeps them", file=sys.stderr)
    else:  # loaded into the net as it was trained; only then does it get its new head
        net |= {"weights": options.weights, "match": options.match, "allow_partial": options.allow_partial}
        trained, report = build_model(**net)
        print(f"{options.weights}: {report.summary() if report else ''}")
        for head in options.head or [None]:
            replace_head(trained.module, classes, head)  # with Xavier's numbers, or Kaiming's for a convolution
        own, wanted = ({name: list(t.shape) for name, t in each.state_dict().items()} for each in (trained.module, module))
        for name in [name for name in wanted if own.get(name) != wanted[name]]:
            raise UsageError(f"{name} is {own.get(name)} with the new head, and {wanted[name]} where {built.factory} is made for"
                             f" {classes} classes: name the layers that end in classes with --head")  # fmt: skip
        module = trained.module
    if options.freeze:
        freeze(module, *options.freeze)  # BatchNorm among them stays in eval mode
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise UsageError("--freeze leaves nothing to train")
    return module, preprocess, f"{spec.name}={'x'.join(map(str, spec.shape))}"


# 2. The training: each epoch ends with a judgement and a checkpoint


class Training:
    def __init__(self, options: argparse.Namespace, module: nn.Module, train: Pictures, held: Pictures) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.options, self.out, self.module = options, options.output, module.to(device)
        # What a resumed run must have in common with the one it goes on with.
        settings = vars(options) | {"output": "", "resume": "", "images": len(train)}
        self.settings = {name: str(value) for name, value in settings.items()}
        self.seed, self.best, self.wrong = 1000 * options.seed, (-1.0, 0), list[Tensor]()
        load = partial(DataLoader, batch_size=options.batch_size, num_workers=options.workers, pin_memory=device.type == "cuda")
        self.train = load(train, shuffle=True, drop_last=len(train) >= options.batch_size)  # a last one alone has no variance
        self.held = load(held)
        kind, lr, more = OPTIMIZERS[options.optimizer]
        optimizer = kind([each for each in module.parameters() if each.requires_grad], options.lr or lr, **more)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.share_of_rate)
        scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
        self.parts = {"module": module, "optimizer": optimizer, "schedule": self.schedule, "scaler": scaler}
        loss = nn.CrossEntropyLoss(label_smoothing=0.05)
        mixed: dict[str, Any] = {"amp_mode": "amp", "scaler": scaler} if scaler.is_enabled() else {}
        mixed["model_transform"] = lambda output: getattr(output, "logits", output)  # Inception has others beside them
        self.trainer = create_supervised_trainer(module, optimizer, loss, device, **mixed)
        self.judge = create_supervised_evaluator(module, {"top1": Accuracy(), "loss": Loss(nn.CrossEntropyLoss())}, device)

    def share_of_rate(self, step: int) -> float:
        """In a line up for a tenth of the steps, then down in half a cosine wave (SGDR, 2017, arXiv:1608.03983)."""
        steps = self.options.epochs * len(self.train)
        warm = max(1, steps // 10)
        return (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2

    def resume(self) -> None:
        kept = torch.load(self.out / "last.pt", map_location="cpu", weights_only=True)
        for name, value in self.settings.items():
            if kept["settings"].get(name) != value:
                raise UsageError(f"{self.out} was begun with {name} {kept['settings'].get(name)}, and not {value}")
        for name, part in self.parts.items():
            part.load_state_dict(kept[name])
        self.best = kept["best"]
        self.trainer.load_state_dict({"epoch": kept["epoch"], "epoch_length": len(self.train), "max_epochs": self.options.epochs})

    def run(self) -> tuple[float, int]:
        trainer, judge = self.trainer, self.judge
        # All that is random in an epoch follows from its number, so that a resumed run sees the same pictures.
        trainer.add_event_handler(Events.EPOCH_STARTED, lambda: torch.manual_seed(self.seed + trainer.state.epoch))
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: self.schedule.step())
        judge.add_event_handler(Events.ITERATION_COMPLETED, self.collect_wrong)
        ProgressBar(disable=None).attach(trainer, output_transform=lambda loss: {"loss": loss})
        with TensorboardLogger(log_dir=str(self.out / "logs"), purge_step=trainer.state.iteration + 1) as board:
            board.attach_output_handler(
                trainer, Events.ITERATION_COMPLETED, "train", output_transform=lambda loss: {"loss": loss}
            )
            board.attach_opt_params_handler(trainer, Events.ITERATION_COMPLETED, self.parts["optimizer"])
            learnt = [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]
            board.attach(trainer, WeightsHistHandler(self.module, whitelist=learnt), Events.EPOCH_COMPLETED)
            trainer.add_event_handler(Events.EPOCH_COMPLETED, self.end_epoch, board.writer)
            if trainer.state.epoch < self.options.epochs:  # else the resumed run was over
                trainer.run(self.train, max_epochs=self.options.epochs)
        return self.best

    def collect_wrong(self, judge: Engine) -> None:
        (images, labels), found = judge.state.batch, judge.state.output[0].argmax(1).cpu()
        self.wrong += images[found != labels][: 32 - len(self.wrong)]  # a grid of them goes to TensorBoard

    def end_epoch(self, trainer: Engine, board: Any) -> None:
        self.wrong.clear()
        metrics, epoch = self.judge.run(self.held).metrics, trainer.state.epoch
        top1 = 100 * metrics["top1"]
        for name, value in metrics.items():
            board.add_scalar(f"judged/{name}", value, trainer.state.iteration)
        if self.wrong:
            board.add_image("judged/wrong", make_grid(self.wrong, normalize=True, scale_each=True), trainer.state.iteration)
        if better := top1 > self.best[0]:
            self.best = (top1, epoch)
            save(self.out / "best.pth", self.module.state_dict())
        states = {name: part.state_dict() for name, part in self.parts.items()}
        save(self.out / "last.pt", {**states, "epoch": epoch, "best": self.best, "settings": self.settings})
        print(f"epoch {epoch}/{self.options.epochs}: top-1 {top1:.2f} %{', the best so far' if better else ''}", flush=True)


def save(path: Path, content: Any) -> None:
    """Write a file whole or not at all: after a kill, or on a full disk, that of before is there."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    draft = path.with_name(f".{path.name}.partial")
    try:
        draft.write_bytes(buffer.getbuffer())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


# 3. The program


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("pictures", type=Path, metavar="PICTURES")
    net = parser.add_mutually_exclusive_group(required=True)
    net.add_argument("--arch", metavar="NAME", help="a reference architecture, torchvision:NAME or timm:NAME")
    net.add_argument("--model", metavar="FILE.py:FACTORY", help="a net of your own, whose factory takes num_classes")
    add("--model-arg", action="append", default=[], metavar="K=V", help="argument of the factory; may be repeated")
    add("--weights", type=Path, metavar="FILE", help="the trained weights to begin with; default: random ones")
    add("--match", choices=("name", "order"), default="name", help="how their tensors are paired; default: %(default)s")
    add("--allow-partial", action="store_true", help="load the tensors that fit")
    add("--head", nargs="+", metavar="LAYER", help="layers that end in classes; default: the last of fc, head, classifier")
    add("--freeze", nargs="+", default=[], metavar="PREFIX", help="layers that are not trained, such as conv1 layer1")
    add("--input", metavar="NAME=1x3xHxW", help="default: the architecture's own")
    add("--preprocess", metavar="NAME|FILE.json", help="how an image becomes the input; default: the architecture's own")
    add("--augment", nargs="*", choices=AUGMENTATIONS, default=list(AUGMENTATIONS), help="default: all of them")
    add("--area", type=float, default=0.5, help="least share of a picture that crop keeps; default: %(default)s")
    add("--epochs", type=int, default=10, help="default: %(default)s")
    add("--batch-size", type=int, default=32, help="default: %(default)s")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="default: %(default)s")
    add("--lr", type=float, help="the highest learning rate; default: 0.001, of sgd 0.01")
    add("--seed", type=int, default=0, help="of the split, new layers, order and augmentation; default: %(default)s")
    add("--workers", type=int, default=2, help="processes that read pictures; default: %(default)s")
    add("-o", "--output", type=Path, metavar="OUT", help="default: build/runs/PICTURES-NAME")
    add("--resume", action="store_true", help="go on after the last whole epoch in OUT, if there is one")
    options = parser.parse_args()
    if min(options.epochs, options.batch_size) < 1 or not 0 < options.area <= 1:
        parser.error("--epochs and --batch-size must be 1 or more, --area more than 0 and at most 1")
    run = f"{options.pictures.resolve().name}-{(options.arch or options.model).rpartition(':')[2]}"
    options.output = options.output or Path("build", "runs", run)
    return options


def fine_tune(options: argparse.Namespace) -> None:
    out = options.output
    if (out / "last.pt").exists() and not options.resume:
        raise UsageError(f"{out} holds a run: --resume goes on with it, and another -o keeps it")
    torch.manual_seed(options.seed)
    train, held = find(options.pictures, out / "split", options.seed)
    module, preprocess, spec = build(options, len(train.classes))
    check([path for folder in (train, held) for path, _ in folder.samples], preprocess)
    learning, every = (sum(p.numel() for p in module.parameters() if p.requires_grad or any_) for any_ in (False, True))
    print(f"{len(train.samples):,} images of {len(train.classes)} classes to train on, {len(held.samples):,} to judge by;"
          f" {learning:,} of {every:,} weights learn")  # fmt: skip
    changed = Pictures(train, preprocess, options.augment, options.area)
    training = Training(options, module, changed, Pictures(held, preprocess))
    if options.resume and (out / "last.pt").exists():
        training.resume()
    out.mkdir(parents=True, exist_ok=True)
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in train.classes), encoding="utf-8")
    (out / "preprocess.json").write_text(json.dumps(preprocess.to_json(), indent=1), encoding="utf-8")
    best, epoch = training.run()
    net = [f"--arch={options.arch}" if options.arch else f"--model={options.model}"]
    net += [f"--model-arg={arg}" for arg in options.model_arg]
    files = ["--weights", out / "best.pth", "--preprocess", out / "preprocess.json", "--classes", out / "classes.txt"]
    target = Path("build", out.name)
    target = target if not target.exists() or (target / "manifest.json").exists() else f"{target}-onnx"
    command = ["export", *net, "--input", spec, *files, "--eval", held.root, "--expect-top1", f"{best:.2f}", "-o", target]
    print(f"{out / 'best.pth'}: top-1 {best:.2f} %, of epoch {epoch}. Next:\ndeploy {shlex.join(map(str, command))}")


def main() -> int:
    logging.getLogger("ignite").setLevel(logging.CRITICAL)  # it logs what is raised, and that is said below
    options = parse()
    try:
        fine_tune(options)
        return 0
    except DeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except (OSError, KeyboardInterrupt) as error:
        hint = "; --resume goes on after the last whole epoch" if (options.output / "last.pt").exists() else ""
        print(f"stopped: {str(error) or 'interrupted'}{hint}", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 130


if __name__ == "__main__":
    sys.exit(main())
