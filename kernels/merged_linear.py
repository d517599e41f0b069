"""Linear layers of one input as one matrix product, with LoRA on some of them.

    merge_linear_layers(model)                      # once the weights are frozen
    parts = linear_layers(x, [q_proj, k_proj, v_proj], merged)

The weights (n_out, n_in) of such layers lie one below the other in one tensor; theirs are views of
it. LoRA adds alpha/r * (x A^T) B^T to some columns of the output, A and B in the dtype of x, from
masters in fp32. The gradients to A and B are summed and returned in fp32.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import fused
from fused import use_kernels
from linear_ce_kl import mm

class Merged(NamedTuple):
    weight: torch.Tensor                            # (n_out of all layers, n_in)
    bias: torch.Tensor | None

class _LoRA(torch.autograd.Function):
    """x (T, n_in) times weight (n_out, n_in), plus for each of `loras`, (first column, scale,
    dropout), the product with its A (r, n_in) and B (columns, r)."""

    @staticmethod
    def forward(ctx, x, weight, bias, loras, *factors):
        out, saved = F.linear(x, weight, bias), []
        for (first, scale, p), A, B in zip(loras, factors[::2], factors[1::2]):
            keep = None                             # what dropout multiplies x with
            if p:
                keep = F.dropout(torch.ones_like(x), p)
            low_rank = (x if keep is None else x * keep) @ A.to(x.dtype).T      # (T, r)
            columns = out[:, first:first + len(B)]
            columns.addmm_(low_rank, (scale * B).to(x.dtype).T)
            saved += low_rank, keep
        ctx.loras = loras
        ctx.save_for_backward(x, weight, *factors, *saved)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, *rest = ctx.saved_tensors
        n = 2 * len(ctx.loras)
        d_x = grad @ weight if ctx.needs_input_grad[0] else None
        d_factors = []
        for i, (first, scale, _) in enumerate(ctx.loras):
            A, B, low_rank, keep = *rest[2 * i:2 * i + 2], *rest[n + 2 * i:n + 2 * i + 2]
            columns = grad[:, first:first + len(B)]                             # (T, columns)
            d_low_rank = columns @ (scale * B).to(x.dtype)                      # (T, r)
            d_factors += [mm(d_low_rank.T, x if keep is None else x * keep),
                          scale * mm(columns.T, low_rank)]
            if d_x is not None and keep is None:
                d_x.addmm_(d_low_rank, A.to(x.dtype))
            elif d_x is not None:
                d_x.addcmul_(d_low_rank @ A.to(x.dtype), keep)
        return d_x, None, None, None, *d_factors

def linear_layers(x, layers, merged):
    """Return what linear layers, with LoRA or without, make of x (T, n_in): a list with the output
    of each, or, by `merged` if that still is their weight, with all of them side by side."""
    weight = layers[0].base_layer.weight if hasattr(layers[0], "lora_A") else layers[0].weight
    if not (merged and merged.weight.data_ptr() == weight.data_ptr() and use_kernels(x, weight)):
        return [layer(x) for layer in layers]
    first, loras, factors = 0, [], []
    for layer in layers:
        if getattr(layer, "enabled", False):
            loras.append((first, layer.scale, layer.dropout.p if layer.training else 0))
            factors += layer.lora_A, layer.lora_B
        first += layer.out_features
    return [_LoRA.apply(x, merged.weight, merged.bias, loras, *factors)]

def _merge(layers, old):
    """Merged weights of linear layers, the old ones if they still serve; None if there are none."""
    bases = [getattr(layer, "base_layer", layer) for layer in layers]
    weights, biases = [base.weight for base in bases], [base.bias for base in bases]
    if not all(isinstance(base, nn.Linear) and not base.weight.requires_grad for base in bases):
        return None
    if len({bias is None for bias in biases}) == 2:
        return None
    if old and old.weight.data_ptr() == weights[0].data_ptr():
        return old
    merged = Merged(torch.cat(weights), None if biases[0] is None else torch.cat(biases))
    for base, part in zip(bases, merged.weight.split([len(weight) for weight in weights])):
        base.weight = nn.Parameter(part, requires_grad=False)
    return merged

def merge_linear_layers(model):
    """Merge the layers q, k, v and gate, up of each block; not on a CPU."""
    if model.device.type == "cuda" or fused.INTERPRET:
        for block in model.layers:
            attention, mlp = block.self_attn, block.mlp
            qkv = attention.q_proj, attention.k_proj, attention.v_proj
            attention.merged = _merge(qkv, attention.merged)
            mlp.merged = _merge((mlp.gate_proj, mlp.up_proj), mlp.merged)
