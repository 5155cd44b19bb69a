"""stub"""
from __future__ import annotations
import torch
from torch import Tensor
from safe_sched.identity import Layout, label_positions


@torch.no_grad()
def pool_rows(hidden: Tensor, labels: Tensor, layout: Layout) -> Tensor:
    flat = hidden.flatten(0, 1)
    counted = label_positions(labels, layout)
    row, position = layout.row.flatten(), layout.position.flatten()
    at = counted.flatten().nonzero().flatten()
    width = flat.shape[1]
    total = torch.zeros(layout.rows, width, device=flat.device)
    total.index_add_(0, row[at], flat[at.to(flat.device)].float())
    count = torch.zeros(layout.rows, device=flat.device).index_add_(0, row[at], torch.ones(at.numel(), device=flat.device))
    first = torch.full((layout.rows,), layout.row.numel(), device=row.device).scatter_reduce_(0, row[at], position[at], "amin")
    before = ((row >= 0) & (position == first[row.clamp(min=0)] - 1)).nonzero().flatten()
    last = torch.zeros_like(total)
    last[row[before]] = flat[before].float()
    return torch.cat([total / count.clamp(min=1)[:, None], last], 1)
