"""Several processes: the exchange between their sessions (`safe_sched.training.ranks`), over `torch.distributed`.

One collective per exchange: every rank sends a block of fixed size, which holds whether it is well, which exchange it
means, and what it has to say. What does not fit follows in a second collective. The group is one of its own, on the CPU
(gloo): nothing waits for the device, and the order of the trainer's collectives is not touched.

A rank that fails between two exchanges takes part in the next one, to say so; the others stop there with its name and
its error. One that fails where the others wait in a collective of the trainer's, as in the middle of a backward, cannot
tell them: its process ends, and the launcher ends theirs, as it does without safe-sched.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer

from safe_sched.errors import ModelError, RankError
from safe_sched.estimators.probe import GAIN
from safe_sched.training.ranks import Alone, Exchange

BLOCK = 2048
"""Bytes that every rank sends in an exchange; more follows separately."""

PATIENCE = 60.0
"""Seconds that a failed rank waits for the others to hear of it."""

_HEAD = 3 * 8  # well or not, which exchange, bytes


class Ranks:
    """The exchange of one rank with the others.

    Args:
        group: Of all ranks, on the CPU.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._over = False  # a rank has failed, and this one knows

    def __call__(self, what: str, *mine: Tensor) -> list[tuple[Tensor, ...]]:
        """See `safe_sched.training.ranks.Exchange`."""
        try:
            return self._exchange(what, mine)
        except RuntimeError as error:
            self._over = True
            if isinstance(error, RankError):
                raise
            # gloo's own words name sockets
            raise RankError(
                f"rank {self.rank} lost another rank, which has ended or is out of reach (exchanging {what!r}). "
                "Its own output says why."
            ) from error

    def fail(self, error: BaseException) -> None:
        """See `safe_sched.training.ranks.Exchange`; gives up after `PATIENCE`."""
        if self._over:
            return
        self._over = True
        text = f"{type(error).__name__}: {error}".encode()[: BLOCK - _HEAD]
        with contextlib.suppress(RuntimeError):
            self._blocks(_block([0, 0, len(text)], text), patience=datetime.timedelta(seconds=PATIENCE))

    def _exchange(self, what: str, mine: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        sizes = [size for tensor in mine for size in (tensor.dim(), *tensor.shape)]
        flat = [torch.tensor(sizes, dtype=torch.long), *(tensor.contiguous() for tensor in mine)]
        data = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in flat])
        name = int.from_bytes(hashlib.sha256(what.encode()).digest()[:7], "big")
        blocks = self._blocks(_block([1, name, data.numel()], data[: BLOCK - _HEAD].numpy().tobytes()))
        heads = blocks[:, :_HEAD].contiguous().view(torch.long)
        for rank, (well, other, length) in enumerate(heads.tolist()):
            if not well:
                text = bytes(blocks[rank, _HEAD : _HEAD + length].tolist()).decode(errors="replace")
                raise RankError(f"rank {rank} stopped: {text}")
            if other != name:
                raise RankError(
                    f"rank {rank} is at another place of the training loop than rank {self.rank}, which exchanges "
                    f"{what!r}. The ranks do not train alike: look for code that depends on the rank."
                )
        lengths = heads[:, 2]
        found = blocks[:, _HEAD:]
        most = int(lengths.max())
        if most > BLOCK - _HEAD:
            rest = torch.zeros(most - (BLOCK - _HEAD), dtype=torch.uint8)
            left = data[BLOCK - _HEAD :]
            rest[: left.numel()] = left
            found = torch.cat([found, self._blocks(rest)], 1)
        return [_tensors(found[rank, :length], mine) for rank, length in enumerate(lengths.tolist())]

    def _blocks(self, mine: Tensor, patience: datetime.timedelta | None = None) -> Tensor:
        """The block of every rank: uint8 (ranks, bytes)."""
        found = [torch.empty_like(mine) for _ in range(self.ranks)]
        work = dist.all_gather(found, mine, group=self._group, async_op=True)
        assert work is not None
        work.wait() if patience is None else work.wait(patience)
        return torch.stack(found)


def _block(head: Sequence[int], data: bytes) -> Tensor:
    start = torch.tensor(head, dtype=torch.long).view(torch.uint8)
    block = torch.zeros(BLOCK, dtype=torch.uint8)
    block[:_HEAD] = start
    block[_HEAD : _HEAD + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else 0
    return block


def _tensors(data: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What `Ranks._exchange` has laid side by side."""
    at, found = 0, []

    def take(count: int, dtype: torch.dtype) -> Tensor:
        nonlocal at
        end = at + count * torch.empty(0, dtype=dtype).element_size()
        part = data[at:end].clone().view(dtype)  # a copy, since views want their bytes aligned
        at = end
        return part

    # the sizes come first, so their number is found as they are read
    shapes = []
    for _ in like:
        (dims,) = take(1, torch.long).tolist()
        shapes.append(take(dims, torch.long).tolist())
    for tensor, shape in zip(like, shapes, strict=True):
        count = 1
        for size in shape:
            count *= size
        found.append(take(count, tensor.dtype).reshape(shape))
    return tuple(found)


_group: tuple[dist.ProcessGroup | None, dist.ProcessGroup] | None = None


def exchange_of(trainer: Trainer) -> Exchange:
    """The exchange between the processes of a trainer's run. All of them must call this."""
    global _group
    if trainer.args.world_size == 1:
        return Alone()
    world = dist.group.WORLD
    if _group is None or _group[0] is not world:  # one for all runs of a process
        made = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=trainer.args.ddp_timeout))
        assert isinstance(made, dist.ProcessGroup)
        if _group is None:
            atexit.register(_give_back)
        _group = world, made
    return Ranks(_group[1])


def _give_back() -> None:
    """Before the interpreter ends: its threads may otherwise outlive what they need."""
    if _group is not None and dist.is_initialized() and _group[0] is dist.group.WORLD:
        dist.destroy_process_group(_group[1])


@contextlib.contextmanager
def telling(exchange: Exchange) -> Iterator[None]:
    """While this lasts, an error is an error on all ranks."""
    try:
        yield
    except Exception as error:
        exchange.fail(error)
        raise


def of_all(exchange: Exchange, what: str, mine: Sequence[Tensor]) -> list[Tensor]:
    """Rows of tokens of all ranks, in their order: int64 (any,) each."""
    sizes = torch.tensor([row.numel() for row in mine], dtype=torch.long)
    flat = torch.cat([torch.empty(0, dtype=torch.long), *(row.cpu().long() for row in mine)])
    return [row for lengths, tokens in exchange(what, sizes, flat) for row in tokens.split(lengths.tolist())]


def first_of(exchange: Exchange, what: str, *mine: Tensor) -> tuple[Tensor, ...]:
    """Rank 0's tensors, on all ranks: what each has worked out for itself may differ in its last digits."""
    return exchange(what, *(tensor.cpu() for tensor in mine))[0]


# a model whose parameters are sharded over the ranks (FSDP2) ------------------------------------------------------


def reshard(model: nn.Module) -> None:
    """Have the shards in place of what was gathered from them; harmless for a model that is not sharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class ShardedDirection:
    """`safe_sched.estimators.probe.Direction` in a sharded model.

    Every rank moves its own shards, in place, and puts a copy back; what FSDP has gathered is let go each time, as it
    would be stale. Lengths are those of all shards together.

    Args:
        model: Sharded.
        parameters: Its trainable parameters, as shards.
        gradients: Theirs, as shards, or None where they are 0.
        exchange: Joins the ranks, all of which must do this.
        gain: Nats that m is to gain.

    Raises:
        ModelError: The gradient is zero or not finite, or the parameters' floats are too coarse for the move.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor | None],
        exchange: Exchange,
        gain: float = GAIN,
    ) -> None:
        pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        self.model, self.parts = model, [(_shard(p), _shard(g)) for p, g in pairs]
        square = _total(exchange, sum(float(g.double().square().sum()) for _, g in self.parts))
        if not math.isfinite(square) or square == 0:
            raise ModelError(
                f"the gradient of the refusal margin is {square}: the safety rows do not reach a trainable parameter, "
                "or the model is not finite. Check that safety_data holds prompts with refusals."
            )
        self.scale = gain / square
        moves = ((torch.add(p, g, alpha=self.scale) - p, g) for p, g in self.parts)
        gained = _total(exchange, sum(float((change.double() * g.double()).sum()) for change, g in moves))
        if not 0.8 * gain <= gained <= 1.25 * gain:
            raise ModelError(
                f"moving the parameters along the refusal margin gains {gained:.2g} nats instead of {gain}: they are "
                "stored too coarsely. Load the model in float32 and train with bf16=True."
            )

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Have the parameters moved for a while. They come back bit for bit."""
        kept = [(p, p.clone()) for p, _ in self.parts]
        try:
            for p, g in self.parts:
                p.add_(g, alpha=self.scale)
            reshard(self.model)
            yield
        finally:
            for p, values in kept:
                p.copy_(values)
            reshard(self.model)


def _shard(tensor: Any) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _total(exchange: Exchange, mine: float) -> float:
    return sum(float(theirs) for (theirs,) in exchange("length", torch.tensor(mine, dtype=torch.float64)))
