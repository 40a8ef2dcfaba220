"""A layer of experts and a model by plain formulas in fp64, one token at a time where it matters."""

from __future__ import annotations

import math

import torch

from moesim.measurement.distributed.layer_shapes import ExpertLayerShape
from moesim.measurement.distributed.training_models import ModelShape


def kept(choices: torch.Tensor, shape: ExpertLayerShape) -> torch.Tensor:
    """Give slots to first choices of all tokens of a group, then to second ones."""
    keeps = torch.ones_like(choices, dtype=torch.bool)
    if shape.capacity_factor is None:
        return keeps
    per_choice = shape.experts_per_token if shape.capacity_per == "assignment" else 1
    tokens = shape.group_tokens or shape.tokens
    slots = max(1, math.ceil(shape.capacity_factor * per_choice * tokens / shape.num_experts - 1e-9))
    group = shape.group_tokens or len(choices)
    for begin in range(0, len(choices), max(group, 1)):
        filled = [0] * shape.num_experts
        for choice in range(choices.shape[1]):
            for token in range(begin, min(begin + group, len(choices))):
                expert = int(choices[token, choice])
                keeps[token, choice] = filled[expert] < slots
                filled[expert] += 1
    return keeps


def layer(tokens: torch.Tensor, weights: dict, shape: ExpertLayerShape, choices: torch.Tensor | None) -> torch.Tensor:
    """Run a layer that has all experts; ``choices`` None follows the router."""
    prototypes = shape.experts_per_token if shape.router == "k_top_1" else 1
    size = shape.num_experts // prototypes
    logits = tokens @ weights["router"].T
    parts = [logits[:, first : first + size].softmax(-1) for first in range(0, shape.num_experts, size)]
    probabilities = torch.cat(parts, dim=1)
    if choices is None:
        if prototypes == 1:
            choices = probabilities.argsort(dim=-1, descending=True)[:, : shape.experts_per_token]
        else:
            choices = torch.stack([part.argmax(-1) + size * index for index, part in enumerate(parts)], dim=1)
    keeps = kept(choices, shape)
    out = torch.zeros_like(tokens)
    for expert in range(shape.num_experts):
        for choice in range(choices.shape[1]):
            chosen = (choices[:, choice] == expert) & keeps[:, choice]
            up = tokens[chosen] @ weights["up"][expert].T
            if shape.is_gated:
                gate, value = up[:, : shape.inner], up[:, shape.inner :]
                inner = gate * torch.sigmoid(gate) * value
            else:
                inner = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
            result = inner @ weights["down"][expert].T
            out = out.index_add(0, chosen.nonzero()[:, 0], result * probabilities[chosen, expert, None])
    return out


def norm(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return tokens / (tokens.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def attention(tokens: torch.Tensor, weights: dict, shape: ModelShape) -> torch.Tensor:
    sizes = shape.attention
    joined = (tokens @ weights["queries_keys_values"].T).view(sizes.batch, sizes.length, -1, sizes.head_size)
    queries, keys, values = joined.transpose(1, 2).split([sizes.heads, sizes.kv_heads, sizes.kv_heads], dim=1)
    repeats = sizes.heads // sizes.kv_heads
    keys, values = keys.repeat_interleave(repeats, dim=1), values.repeat_interleave(repeats, dim=1)
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(sizes.head_size)
    future = torch.ones(sizes.length, sizes.length, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ values
    return mixed.transpose(1, 2).reshape(len(tokens), -1) @ weights["output"].T


def loss(
    weights: dict, shape: ModelShape, words: torch.Tensor, targets: torch.Tensor, choices: list[torch.Tensor]
) -> torch.Tensor:
    """Mean cross-entropy of one rank's tokens in a model that has all experts."""
    tokens = weights["embedding"][words]
    for block, of_block in enumerate(choices):
        own = {name.split(".")[1]: weight for name, weight in weights.items() if name.startswith(f"{block}.")}
        tokens = tokens + attention(norm(tokens, own["first_norm"]), own, shape)
        tokens = tokens + layer(norm(tokens, own["second_norm"]), own, shape.layer, of_block)
    logits = norm(tokens, weights["final_norm"]) @ weights["head"].T
    return (logits.logsumexp(-1) - logits[torch.arange(len(words)), targets]).mean()
