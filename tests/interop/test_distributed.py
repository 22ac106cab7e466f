"""The detector in torch's wrappers for several devices, here in one process and in two."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastdet import FasterRCNN
from tests.helpers.detectors import small_detector, small_scene

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients_of(
    model: torch.nn.Module, image: int | None = None
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Losses, and the gradients of the parameters that train, of all images or of one."""
    torch.manual_seed(0)
    images, targets = small_scene()
    chosen = slice(None) if image is None else slice(image, image + 1)
    losses = model.train()(images[chosen], targets[chosen])
    sum(losses.values()).backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    return losses, [each.full_tensor() if hasattr(each, "full_tensor") else each for each in found]


@pytest.mark.parametrize("wrapper", ["fully_shard", "by parts", "DistributedDataParallel"])
def test_steps_are_those_of_the_model(wrapper):
    model = small_detector()
    wrapped: torch.nn.Module = copy.deepcopy(model)
    if wrapper == "DistributedDataParallel":
        wrapped = DistributedDataParallel(wrapped)
    else:
        mesh = init_device_mesh("cpu", (1,))
        for part in (wrapped.backbone, wrapped.rpn.head, wrapped.roi_heads.box_head) if wrapper == "by parts" else ():
            fully_shard(part, mesh=mesh)
        fully_shard(wrapped, mesh=mesh)
    expected, found = gradients_of(model), gradients_of(wrapped)
    torch.testing.assert_close(found, expected)
    images, _ = small_scene()
    with torch.no_grad():
        torch.testing.assert_close(wrapped.eval()(images), model.eval()(images))


def steps_on_halves_of_a_batch(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    model = small_detector()
    first, second = (gradients_of(copy.deepcopy(model), image)[1] for image in range(2))
    expected = [(one + other) / 2 for one, other in zip(first, second, strict=True)]
    replicated = DistributedDataParallel(copy.deepcopy(model))
    torch.testing.assert_close(gradients_of(replicated, rank)[1], expected)
    sharded = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    torch.testing.assert_close(gradients_of(sharded, rank)[1], expected)
    dist.destroy_process_group()


def test_two_processes_have_the_mean_of_their_gradients(tmp_path):
    torch.multiprocessing.spawn(steps_on_halves_of_a_batch, (str(tmp_path / "store"),), nprocs=2)


def test_a_distributed_checkpoint_fills_a_model_from_the_meta_device(tmp_path):
    model, images = small_detector(class_weights=(1.0, 2.0, 1.0, 3.0)).eval(), small_scene()[0]
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "checkpoint")
    with torch.device("meta"):
        made: FasterRCNN = small_detector(class_weights=(1.0, 2.0, 1.0, 3.0))
    made.to_empty(device="cpu")
    checkpoint.load({"model": made.state_dict()}, checkpoint_id=tmp_path / "checkpoint")
    with torch.no_grad():
        torch.testing.assert_close(made.eval()(images), model(images))
    assert all(map(torch.equal, made.buffers(), model.buffers()))
