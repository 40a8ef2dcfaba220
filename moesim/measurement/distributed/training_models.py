"""A few blocks between an embedding and a head, and one step of training them over the ranks of a group."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from moesim.measurement.distributed.expert_layers import ExpertLayer, make_layer, run_layer
from moesim.measurement.distributed.layer_shapes import Draw, ExpertLayerShape
from moesim.measurement.distributed.optional_back_ends import TORCH, BackEnds
from moesim.measurement.distributed.ranks import Ranks
from moesim.measurement.distributed.trained_parameters import ParameterShape, TrainedParameters, make_parameters
from moesim.measurement.suites.attentions import AttentionShape
from moesim.measurement.suites.memory_bound import rms_norm
from moesim.measurement.suites.moe_layers import MoeWeights
from moesim.measurement.suites.routed_rows import differentiable
from moesim.measurement.suites.transformer_blocks import BlockWeights, run_block_around

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from moesim.measurement.workbenches import Workbench

NORMS = ("first_norm", "second_norm")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Blocks of attention and a layer of experts of the same tokens, and the vocabulary around them."""

    attention: AttentionShape
    layer: ExpertLayerShape
    num_blocks: int
    vocabulary: int
    micro_batches: int = 1

    def __post_init__(self) -> None:
        """Refuse attention over other tokens than those of the layer."""
        if self.attention.batch * self.attention.length != self.layer.tokens:
            raise ValueError(f"{self.attention} and {self.layer.tokens} tokens of the layer contradict each other")

    def names(self) -> dict[str, int | str]:
        """Return what identifies the model in a record."""
        attention = self.attention
        return {
            "blocks": self.num_blocks,
            "vocabulary": self.vocabulary,
            "micro_batches": self.micro_batches,
            "batch": attention.batch,
            "length": attention.length,
            "heads": attention.heads,
            "kv_heads": attention.kv_heads,
            "head_size": attention.head_size,
            **self.layer.names(),
        }

    def parameters(self, num_ranks: int) -> list[ParameterShape]:
        """Return the weights of one of several expert-parallel ranks.

        Parameters
        ----------
        num_ranks : int
            Of the expert-parallel group.
        """
        attention, layer, hidden = self.attention, self.layer, self.layer.hidden
        joined = (attention.heads + 2 * attention.kv_heads) * attention.head_size
        local = layer.num_experts // num_ranks
        found = [ParameterShape("embedding", (self.vocabulary, hidden))]
        for block in range(self.num_blocks):
            found += [ParameterShape(f"{block}.{norm}", (hidden,)) for norm in NORMS]
            found += [
                ParameterShape(f"{block}.queries_keys_values", (joined, hidden)),
                ParameterShape(f"{block}.output", (hidden, attention.heads * attention.head_size)),
                ParameterShape(f"{block}.router", (layer.num_experts, hidden), is_full_precision=True),
                ParameterShape(f"{block}.up", (local, layer.up_columns, hidden), is_expert=True),
                ParameterShape(f"{block}.down", (local, hidden, layer.inner), is_expert=True),
            ]
        return [*found, ParameterShape("final_norm", (hidden,)), ParameterShape("head", (self.vocabulary, hidden))]


@dataclass(frozen=True, slots=True)
class TrainingModel:
    """A model on one rank: its weights, where its tokens go, and the tokens of its micro-batches."""

    shape: ModelShape
    ranks: Ranks
    parameters: TrainedParameters
    layers: tuple[ExpertLayer, ...]
    batches: tuple[tuple[Tensor, Tensor], ...]

    @property
    def name(self) -> str:
        """The routines of a step, for records."""
        reduction = "all_reduce in fp32" if self.ranks.size > 1 else "no reduction"
        return f"{self.layers[0].name}, scaled_dot_product_attention, {reduction}, torch._fused_adamw_"

    def block_weights(self, block: int) -> tuple[BlockWeights, MoeWeights]:
        """Return the weights of one block."""

        def weight(name: str) -> Tensor:
            return self.parameters.weights[f"{block}.{name}"]

        def total(name: str) -> Tensor:
            return self.parameters.sums[f"{block}.{name}"]

        names = ("queries_keys_values", "output")
        outside = BlockWeights(*(weight(name) for name in (*NORMS, *names)), *(total(name) for name in names))
        experts = ("router", "up", "down")
        return outside, MoeWeights(*(weight(name) for name in experts), *(total(name) for name in experts))


def make_model(
    bench: Workbench,
    shape: ModelShape,
    ranks: Ranks,
    *,
    dtype: str,
    routed: Sequence[Draw | None],
    seed: int,
    is_trained: bool = True,
    back_ends: BackEnds = TORCH,
) -> TrainingModel:
    """Fill a model.

    Parameters
    ----------
    bench : Workbench
        The device.
    shape : ModelShape
        Sizes.
    ranks : Ranks
        The processes.
    dtype : str
        Of weights and activations; gradients and the optimizer are fp32.
    routed : sequence of Draw
        Of each block; None follows the router's own choice.
    seed : int
        Of the order of the tokens.
    is_trained : bool
        Whether there is an optimizer.
    back_ends : BackEnds
        Libraries that replace torch's own.
    """
    parameters = make_parameters(bench, shape.parameters(ranks.expert_parallel), ranks, dtype, is_trained=is_trained)
    for name in _norm_names(shape):
        parameters.weights[name].requires_grad_()
    prepare = partial(make_layer, bench, shape.layer, ranks, dtype=dtype, seed=seed, back_ends=back_ends)
    layers = tuple(prepare(routed=of_block, layer=block) for block, of_block in enumerate(routed))
    batches = tuple(
        (_words(bench, shape, seed, 2 * batch), _words(bench, shape, seed, 2 * batch + 1))
        for batch in range(shape.micro_batches)
    )
    return TrainingModel(shape, ranks, parameters, layers, batches)


def _words(bench: Workbench, shape: ModelShape, seed: int, stream: int) -> Tensor:
    import numpy as np

    drawn = np.random.default_rng([bench.seed, seed, stream]).integers(shape.vocabulary, size=shape.layer.tokens)
    return bench.integers(drawn)


def _norm_names(shape: ModelShape) -> list[str]:
    return [f"{block}.{norm}" for block in range(shape.num_blocks) for norm in NORMS] + ["final_norm"]


def loss_of(model: TrainingModel, embedded: Tensor, targets: Tensor) -> Tensor:
    """Run the blocks and the head forward.

    Parameters
    ----------
    model : TrainingModel
        The model.
    embedded : tensor of shape (n_tokens, hidden)
        What the embedding gives.
    targets : tensor of shape (n_tokens,)
        The words to be told.

    Returns
    -------
    tensor of shape ()
        Mean cross-entropy of this rank's tokens in fp32, divided by the micro-batches.
    """
    import torch

    weights, sums, tokens = model.parameters.weights, model.parameters.sums, embedded
    for block, layer in enumerate(model.layers):
        outside, experts = model.block_weights(block)
        tokens = run_block_around(
            partial(run_layer, weights=experts, layer=layer), tokens, model.shape.attention, outside
        )
    normed = rms_norm(tokens, weights["final_norm"])
    logits = differentiable().linear(normed, weights["head"], sums["head"])
    return torch.nn.functional.cross_entropy(logits.float(), targets) / model.shape.micro_batches


def embed(model: TrainingModel, words: Tensor) -> Tensor:
    """Look words up; the result is where the backward pass ends.

    Parameters
    ----------
    model : TrainingModel
        The model.
    words : tensor of shape (n_tokens,)
        Indices.
    """
    return model.parameters.weights["embedding"].index_select(0, words).requires_grad_()


def add_gradients(model: TrainingModel, loss: Tensor, embedded: Tensor, words: Tensor) -> None:
    """Run backward; gradients are added to the sums.

    Parameters
    ----------
    model : TrainingModel
        The model.
    loss : tensor of shape ()
        Of the forward pass.
    embedded : tensor of shape (n_tokens, hidden)
        What it began with.
    words : tensor of shape (n_tokens,)
        Their indices.
    """
    import torch

    names = _norm_names(model.shape)
    of_tokens, *of_norms = torch.autograd.grad(loss, [embedded, *(model.parameters.weights[name] for name in names)])
    model.parameters.sums["embedding"].index_add_(0, words, of_tokens.float())
    torch._foreach_add_([model.parameters.sums[name] for name in names], [grad.float() for grad in of_norms])


def run_passes(model: TrainingModel) -> Tensor:
    """Run forward and backward over all micro-batches; return the mean loss of this rank.

    Parameters
    ----------
    model : TrainingModel
        The model.
    """
    model.parameters.clear_gradients()
    losses = []
    for words, targets in model.batches:
        embedded = embed(model, words)
        loss = loss_of(model, embedded, targets)
        add_gradients(model, loss, embedded, words)
        losses.append(loss.detach())
    return sum(losses[1:], start=losses[0])


def train_step(model: TrainingModel) -> Tensor:
    """Take one step of training: passes, reduction of gradients over ranks, optimizer.

    Parameters
    ----------
    model : TrainingModel
        The model.

    Returns
    -------
    tensor of shape ()
        Mean loss of this rank, before the step.
    """
    loss = run_passes(model)
    model.parameters.reduce_gradients(model.ranks)
    model.parameters.step()
    return loss
