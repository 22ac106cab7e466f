"""Train a detector with Hugging Face Accelerate on one device or several, evaluate it, and write a checkpoint.

    pip install '.[accelerate,eval]'
    python examples/accelerate_loop.py
    python examples/accelerate_loop.py --data voc:PATH --size 320 --weights-backbone IMAGENET1K_V1
    torchrun --nproc-per-node 2 examples/accelerate_loop.py   # or, on GPUs, accelerate launch

Each process takes a batch of its own, and the gradients of two such batches are accumulated, so that a step of the
optimizer sees 2 x 4 x (the number of processes) images.
"""

import argparse
import itertools

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from fastdet.data import VOC, Shapes, collate
from fastdet.engine import build_model, checkpoint, describe_anchors
from fastdet.metrics import coco_average_precision

parser = argparse.ArgumentParser(description="Train a detector with Hugging Face Accelerate.")
parser.add_argument(
    "--data", default="shapes", help="voc:PATH, with the lists train and val; or shapes, drawn (shapes)"
)
parser.add_argument("--size", type=int, default=128, help="shorter side of resized images in pixels (128)")
parser.add_argument("--weights-backbone", help="of --data voc:PATH: IMAGENET1K_V1, or a file")
parser.add_argument("--steps", type=int, default=250, help="of the optimizer (250)")
parser.add_argument("--lr", type=float, default=0.02, help="highest learning rate (0.02)")
parser.add_argument("--out", default="runs/accelerate_loop.pth", help="the checkpoint (runs/accelerate_loop.pth)")


def main() -> None:
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    accelerator = Accelerator(cpu=not cuda, gradient_accumulation_steps=2, mixed_precision="bf16" if cuda else "no")
    # Each process draws samples of its own; all of them train from the weights of the first.
    set_seed(0, device_specific=True)

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
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], args.lr, momentum=0.9)
    # Not prepared, as it counts the steps of the optimizer, which are the same in all processes.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps, pct_start=0.1, cycle_momentum=False
    )
    train_loader = DataLoader(train_set, batch_size=4, shuffle=True, collate_fn=collate)
    # One by one, so that no image is padded to the size of another.
    test_loader = DataLoader(test_set, batch_size=1, collate_fn=collate)
    # The loop moves the images itself: targets stay on the CPU, where the model checks them.
    model, optimizer, train_loader, test_loader = accelerator.prepare(
        model, optimizer, train_loader, test_loader, device_placement=[True, True, False, False]
    )

    model.train()
    step, unread = 0, []
    for images, targets in itertools.chain.from_iterable(itertools.repeat(train_loader)):
        with accelerator.accumulate(model):
            losses = model([image.to(accelerator.device) for image in images], targets)
            loss = sum(losses.values())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()
        unread.append(loss.detach())
        if not accelerator.sync_gradients:
            continue
        step += 1
        # Reading a loss is a host sync, so it is not done at each step.
        if step % 10 == 0 or step == args.steps:
            mean = accelerator.gather(torch.stack(unread).mean()).mean()
            accelerator.print(f"step {step}: loss {mean:.4f}", flush=True)
            unread.clear()
        if step == args.steps:
            break
        schedule.step()

    model.eval()
    found = []
    for images, targets in test_loader:
        with torch.no_grad():
            detections = model([image.to(accelerator.device) for image in images])
        detections = [{name: value.cpu() for name, value in each.items()} for each in detections]
        # Of all processes, without the images that were repeated to give each as many.
        found += accelerator.gather_for_metrics(list(zip(detections, targets, strict=True)), use_gather_object=True)
    if accelerator.is_main_process:
        result = coco_average_precision(*zip(*found, strict=True), architecture["num_classes"])
        print(f"AP {result.ap:.4f}, AP50 {result.ap50:.4f}, AP75 {result.ap75:.4f} of {len(found)} images")

    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        checkpoint.save(args.out, {"architecture": architecture, "class_names": train_set.class_names, "model": state})
    accelerator.end_training()


if __name__ == "__main__":
    main()
