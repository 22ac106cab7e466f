"""What `mask_padding` costs: inference of a padded batch with it and without, in turn.

python -m bench.mask_padding
"""

import statistics
import time

import torch

import fastdet

ROUNDS = 8


def main() -> None:
    for name, batch in (("mobilenet_v2_fpn", 4), ("resnet50_fpn", 2)):
        torch.manual_seed(0)
        models = {
            mask: fastdet.FasterRCNN(name, 21, min_size=320, max_size=480, mask_padding=mask).eval()
            for mask in (False, True)
        }
        images = [torch.rand(3, 480, 320), *torch.rand(batch - 1, 3, 320, 480)]
        seconds: dict[bool, list[float]] = {False: [], True: []}
        with torch.inference_mode():
            for model in models.values():
                model(images)
            for _ in range(ROUNDS):
                for mask, model in models.items():
                    start = time.perf_counter()
                    model(images)
                    seconds[mask].append(time.perf_counter() - start)
        plain, masked = (statistics.median(times) for times in seconds.values())
        print(f"{name}, batch {batch}: {plain * 1e3:.0f} ms, masked {masked * 1e3:.0f} ms, {masked / plain:.2f} times")


if __name__ == "__main__":
    main()
