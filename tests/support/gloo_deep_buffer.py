"""DeepEP's interface of normal kernels over any backend of torch.distributed: what our use of it must get right."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist


class GlooDeepBuffer:
    def __init__(self, group, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        assert num_nvl_bytes > 0
        assert num_rdma_bytes == 0
        self.group, self.size, self.rank = group, group.size(), group.rank()

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> SimpleNamespace:
        hint = lambda row_bytes, ranks: row_bytes * ranks  # noqa: E731
        return SimpleNamespace(get_nvl_buffer_size_hint=hint, get_rdma_buffer_size_hint=lambda *_: 0)

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx, num_experts: int):
        self.num_local = num_experts // self.size
        is_in_rank = torch.stack([(topk_idx // self.num_local == rank).any(1) for rank in range(self.size)], dim=1)
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts)
        return is_in_rank.sum(0), None, per_expert, is_in_rank, None

    def dispatch(self, x, handle=None, topk_idx=None, topk_weights=None, is_token_in_rank=None, **counts):
        if handle is not None:
            assert topk_idx is None
            sources, sent, received = handle
            return self._exchanged(x[sources], sent, received), None, None, None, None, None
        assert topk_weights.dtype == torch.float32
        assert set(counts) == {"num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert"}
        sources = torch.cat([is_token_in_rank[:, rank].nonzero()[:, 0] for rank in range(self.size)])
        sent = is_token_in_rank.sum(0)
        arriving = torch.empty_like(sent)
        dist.all_to_all_single(arriving, sent, group=self.group)
        sent, received = sent.tolist(), arriving.tolist()
        choices = self._exchanged(topk_idx[sources], sent, received) - self.rank * self.num_local
        is_here = (choices >= 0) & (choices < self.num_local)
        weights = self._exchanged(topk_weights[sources], sent, received) * is_here
        choices = torch.where(is_here, choices, -1)
        loads = [int((choices == expert).sum()) for expert in range(self.num_local)]
        rows = self._exchanged(x[sources], sent, received)
        return rows, choices, weights, loads, (sources, sent, received), None

    def combine(self, x, handle, topk_weights=None):
        sources, sent, received = handle
        back = self._exchanged(x, received, sent)
        num_tokens = int(sources.max()) + 1
        weights = None
        if topk_weights is not None:
            of_rows = self._exchanged(topk_weights, received, sent)
            weights = of_rows.new_zeros(num_tokens, of_rows.shape[1]).index_add_(0, sources, of_rows)
        return back.new_zeros(num_tokens, back.shape[1]).index_add_(0, sources, back), weights, None

    def _exchanged(self, rows, sent: list[int], received: list[int]):
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=self.group)
        return out


def grouped_product(a, b, batch_sizes, trans_a: bool = False, trans_b: bool = False):
    """``grouped_gemm.backend.gmm`` by loops."""
    assert batch_sizes.dtype == torch.int64
    assert batch_sizes.device.type == "cpu"
    parts = a.split(batch_sizes.tolist())
    if trans_a:
        return torch.stack([part.T @ rows for part, rows in zip(parts, b.split(batch_sizes.tolist()), strict=True)])
    return torch.cat([part @ (weight.T if trans_b else weight) for part, weight in zip(parts, b, strict=True)])
