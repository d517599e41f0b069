"""Linear layers of one input as one matrix product, on a GPU.

    module.parallel = "gate_proj", "up_proj"        # names of the layers
    merge_linear_layers(model)                      # once their weights are frozen
    parts = parallel_layers(module, x)

The weights (n_out, n_in) lie one below the other in one tensor, and those of the layers are views
of it: nothing is stored twice, and what changes in place is seen.
"""
import torch
import torch.nn.functional as F
from torch import nn

from fused import use_kernels

def _layers(module):
    """The layers of a module, and whether module.merged still has their weights."""
    layers = [getattr(module, name) for name in module.parallel]
    fits = module.merged and all(isinstance(layer, nn.Linear) for layer in layers) and (
        module.merged[0].data_ptr() == layers[0].weight.data_ptr())
    return layers, fits

def merge_linear_layers(model):
    """Set `merged`, (weight, bias) of all layers, in the modules that have parallel layers."""
    for module in (m for m in model.modules() if hasattr(m, "parallel")):
        layers, fits = _layers(module)
        if fits or not all(isinstance(layer, nn.Linear) and use_kernels(layer.weight, layer.weight)
                           and (layer.bias is None) == (layers[0].bias is None)
                           for layer in layers):
            continue
        weight, bias = torch.cat([layer.weight.detach() for layer in layers]), None
        if layers[0].bias is not None:
            bias = torch.cat([layer.bias for layer in layers])
        for layer, part in zip(layers, weight.split([layer.out_features for layer in layers])):
            layer.weight = nn.Parameter(part, requires_grad=False)
        module.merged = weight, bias

def parallel_layers(module, x):
    """Return what the layers make of x (T, n_in): [the output of each] or, where their weights are
    merged, [all of them side by side]."""
    layers, fits = _layers(module)
    if fits and use_kernels(x, layers[0].weight):
        return [F.linear(x, *module.merged)]
    return [layer(x) for layer in layers]
