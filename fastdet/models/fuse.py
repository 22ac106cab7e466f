"""A detector with fewer layers, for inference: BatchNorm folded into the convolutions, ReLU computed with them."""

import copy
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.models.layers import FrozenBatchNorm2d, MaskedBatchNorm2d, with_relu
from fastdet.models.rpn import RPNHead

_NORMS = (nn.BatchNorm2d, MaskedBatchNorm2d, FrozenBatchNorm2d, torchvision.ops.FrozenBatchNorm2d)
_RELU_FUNCTIONS = (F.relu, torch.relu)


def fuse(model: FasterRCNN) -> FasterRCNN:
    """A copy of a detector for inference alone, with fewer layers and the same detections, up to rounding.

    In the backbone, the RPN's head and the box head, each BatchNorm becomes part of the convolution before it, with the
    statistics and weights that it has now (Jacob et al. 2018, arXiv:1712.05877, section 3.2), and each ReLU is computed
    by the convolution before it. A BatchNorm or ReLU whose input is used elsewhere too stays, and so does a part with
    hooks, or whose code `torch.fx` cannot trace because it depends on the values or shapes of tensors.

    The copy is in evaluation mode, compiled if `model` is, and shares no tensor with it: later changes of `model` have
    no effect. It cannot be trained: no parameter takes a gradient, and to call it in training mode is a RuntimeError.
    Its state dict has no entries of what was folded.
    """
    # Channels-last, as a GPU's matrix units take weights.
    fused = copy.deepcopy(model).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    fused.backbone = _fuse_part(fused.backbone)
    if type(fused.rpn.head) is RPNHead:
        # Its forward takes a list, and calls only this.
        fused.rpn.head.conv = _fuse_part(fused.rpn.head.conv)  # type: ignore[assignment]
    fused.roi_heads.box_head = _fuse_part(fused.roi_heads.box_head)
    fused.register_forward_pre_hook(_refuse_training)
    fused._compiled_step = model.compiled_step
    return fused


def _refuse_training(model: nn.Module, _: Any) -> None:
    if model.training:
        raise RuntimeError("a fused model cannot be trained: train the model that it was made of, and fuse that again")


def _in_place(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


class _Proxy(fx.Proxy):
    """Records `x += y` as it is. torch.fx makes `x = x + y` of it, which does not change other names of x."""

    __iadd__, __isub__ = _in_place(operator.iadd), _in_place(operator.isub)
    __imul__, __itruediv__ = _in_place(operator.imul), _in_place(operator.itruediv)


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in _NORMS or super().is_leaf_module(m, module_qualified_name)


def _fuse_part(part: nn.Module) -> nn.Module:
    """The part with fewer layers, or itself if there is nothing to fuse."""
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in part.modules()):
        return part
    try:
        graph = _Tracer().trace(part)
    except Exception:  # of any kind, as a user's code meets symbolic values
        return part
    fused, changed = fx.GraphModule(part, graph), False
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    # In the order of the calls: what follows a BatchNorm that was folded follows the convolution then.
    for node in list(graph.nodes):
        source: Any = node.args[0] if node.args else None
        convolution, layer = _called_layer(fused, source), _called_layer(fused, node)
        if type(convolution) is not nn.Conv2d or calls[source.target] > 1 or len(source.users) > 1:
            continue
        if type(layer) in _NORMS and layer.running_mean is not None:
            replacement = fuse_conv_bn_eval(convolution, layer)
        elif type(layer) is nn.ReLU or node.target in _RELU_FUNCTIONS:
            replacement = with_relu(convolution)
        else:
            continue
        fused.set_submodule(source.target, replacement)
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        changed = True
    if not changed:
        return part
    fused.delete_all_unused_submodules()
    fused.recompile()
    return fused


def _called_layer(part: nn.Module, node: Any) -> Any:
    """The layer that a node of a graph calls; None if it is no such node."""
    is_call = isinstance(node, fx.Node) and node.op == "call_module"
    return part.get_submodule(str(node.target)) if is_call else None
