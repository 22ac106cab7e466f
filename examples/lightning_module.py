"""Train a detector with Lightning, evaluate it after each epoch, and write a checkpoint.

pip install '.[lightning,eval]'
python examples/lightning_module.py
python examples/lightning_module.py --data voc:PATH --size 320 --weights-backbone IMAGENET1K_V1
"""

import argparse

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from fastdet.data import VOC, Shapes, collate
from fastdet.engine import build_model, checkpoint, describe_anchors
from fastdet.metrics import coco_average_precision

parser = argparse.ArgumentParser(description="Train a detector with Lightning.")
parser.add_argument(
    "--data", default="shapes", help="voc:PATH, with the lists train and val; or shapes, drawn (shapes)"
)
parser.add_argument("--size", type=int, default=128, help="shorter side of resized images in pixels (128)")
parser.add_argument("--weights-backbone", help="of --data voc:PATH: IMAGENET1K_V1, or a file")
parser.add_argument("--steps", type=int, default=500, help="of the optimizer (500)")
parser.add_argument("--lr", type=float, default=0.02, help="highest learning rate (0.02)")
parser.add_argument("--out", default="runs/lightning_module.pth", help="the checkpoint (runs/lightning_module.pth)")


class Detector(pl.LightningModule):
    """A detector with its losses, its average precision and its optimizer."""

    def __init__(self, model: torch.nn.Module, num_classes: int, lr: float, steps: int) -> None:
        super().__init__()
        self.model, self.num_classes, self.lr, self.steps = model, num_classes, lr, steps
        self.found: list = []

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        # Targets stay on the CPU: the model checks them there.
        images, targets = batch
        return [image.to(device, non_blocking=True) for image in images], targets

    def training_step(self, batch, batch_idx):
        losses = self.model(*batch)
        loss = sum(losses.values())
        self.log("loss", loss, prog_bar=True, batch_size=len(batch[0]))
        self.log_dict(losses, batch_size=len(batch[0]))
        return loss

    def on_validation_epoch_start(self):
        self.found.clear()

    def validation_step(self, batch, batch_idx):
        images, targets = batch
        detections = [{name: value.cpu() for name, value in each.items()} for each in self.model(images)]
        self.found += zip(detections, targets, strict=True)

    def on_validation_epoch_end(self):
        # On several devices each has found a part: gather them with torch.distributed.all_gather_object first.
        result = coco_average_precision(*zip(*self.found, strict=True), self.num_classes)
        self.log_dict({"AP": result.ap, "AP50": result.ap50, "AP75": result.ap75}, prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], self.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=self.steps, pct_start=0.1, cycle_momentum=False
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main() -> None:
    args = parser.parse_args()
    pl.seed_everything(0)

    settings = {"min_size": args.size, "max_size": 2 * args.size}
    if args.data.startswith("voc:"):
        train_set, test_set = (VOC(args.data.removeprefix("voc:"), split) for split in ("train", "val"))
        architecture = {"backbone": "mobilenet_v2_fpn", "settings": settings}
    else:
        train_set, test_set = Shapes(400, size=args.size), Shapes(50, size=args.size, seed=1)
        anchors = describe_anchors("small", sizes=[args.size * share for share in (0.16, 0.25, 0.4)])
        settings |= {"rpn_min_size": 4.0, "box_representation_size": 128}
        architecture = {"backbone": "small", "anchors": anchors, "settings": settings}
    architecture["num_classes"] = len(train_set.class_names) + 1  # label 0 is the background

    model = build_model(architecture, weights_backbone=args.weights_backbone)
    train_loader = DataLoader(train_set, batch_size=4, shuffle=True, collate_fn=collate)
    # One by one, so that no image is padded to the size of another.
    test_loader = DataLoader(test_set, batch_size=1, collate_fn=collate)
    module = Detector(model, architecture["num_classes"], args.lr, args.steps)
    trainer = pl.Trainer(
        default_root_dir="runs",
        max_steps=args.steps,
        devices=1,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        gradient_clip_val=10.0,
        log_every_n_steps=10,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, train_loader, test_loader)
    # The last epoch may be cut short, and is not evaluated then.
    trainer.validate(module, test_loader)
    content = {"architecture": architecture, "class_names": train_set.class_names, "model": model.state_dict()}
    checkpoint.save(args.out, content)


if __name__ == "__main__":
    main()
