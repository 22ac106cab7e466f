"""Train a detector with a loop in plain torch, evaluate it, and write a checkpoint.

python examples/plain_torch.py
python examples/plain_torch.py --data voc:PATH --size 320 --weights-backbone IMAGENET1K_V1
"""

import argparse
import itertools

import torch
from torch.utils.data import DataLoader

from fastdet.data import VOC, Shapes, collate
from fastdet.engine import build_model, checkpoint, describe_anchors
from fastdet.engine.evaluate import evaluate

parser = argparse.ArgumentParser(description="Train a detector with a loop in plain torch.")
parser.add_argument(
    "--data", default="shapes", help="voc:PATH, with the lists train and val; or shapes, drawn (shapes)"
)
parser.add_argument("--size", type=int, default=128, help="shorter side of resized images in pixels (128)")
parser.add_argument("--weights-backbone", help="of --data voc:PATH: IMAGENET1K_V1, or a file")
parser.add_argument("--steps", type=int, default=500, help="of the optimizer (500)")
parser.add_argument("--lr", type=float, default=0.02, help="highest learning rate (0.02)")
parser.add_argument("--out", default="runs/plain_torch.pth", help="the checkpoint (runs/plain_torch.pth)")


def main() -> None:
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

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

    model = build_model(architecture, weights_backbone=args.weights_backbone).to(device)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], args.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps, pct_start=0.1, cycle_momentum=False
    )
    loader = DataLoader(train_set, batch_size=4, shuffle=True, collate_fn=collate, pin_memory=device.type == "cuda")
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    model.train()
    unread = []
    for step, (images, targets) in enumerate(itertools.islice(batches, args.steps), start=1):
        # Targets stay on the CPU: the model checks them there.
        images = [image.to(device, non_blocking=True) for image in images]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses = model(images, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        unread.append(loss.detach())
        # Reading a loss is a host sync, so it is not done at each step.
        if step % 10 == 0 or step == args.steps:
            print(f"step {step}: loss {torch.stack(unread).mean():.4f}", flush=True)
            unread.clear()

    print(evaluate(model.eval(), test_set, test_set.class_names).table())
    content = {"architecture": architecture, "class_names": train_set.class_names, "model": model.state_dict()}
    checkpoint.save(args.out, content)


if __name__ == "__main__":
    main()
