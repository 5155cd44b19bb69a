"""Features of rows for schedulers that ask for them: pooled hidden states, or the vectors of a sentence encoder.

``"hidden"``: with h_t the last hidden state at token t, T the label tokens of a row and p the token before the first of
them, the last one of its prompt::

    x  =  [ mean over t in T of h_t ,  h_p ]

The first half is what the row's answer says, the second what the model is about to say on its own. Both are read from
the training forward; nothing is run for them.

``"encoder"``: the mean over its tokens of a frozen encoder's last hidden state, for the text of the whole row. Run once
per distinct row, when the row first comes by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from safe_sched.errors import DataError, ModelError, OptionError
from safe_sched.estimators.head import Scorer, Scores
from safe_sched.needs import EncoderVector, HiddenState
from safe_sched.rows.keys import IGNORE_INDEX, Layout, label_positions, layout_of
from safe_sched.training.forward import Forward, decoder
from safe_sched.training.loop import Measurement, Run
from safe_sched.training.session import Batch
from safe_sched_hf.safety import SafetyData, SafetySet

Encoder = Callable[[list[str]], Any]

_CACHED = 200_000  # rows whose vectors are kept: 300 MB at 384 numbers each
_LONGEST = 512  # tokens that an encoder reads of a row, where it does not say less


@torch.no_grad()
def pool_rows(hidden: Tensor, labels: Tensor, layout: Layout) -> Tensor:
    """Features of the rows of a micro-batch.

    Args:
        hidden: (batch, sequence, width), the last hidden state.
        labels: int64 (batch, sequence).
        layout: Where the rows lie.

    Returns:
        float32 (rows, 2 * width) on the device of ``hidden``; 0 for a row without label tokens.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[7, 8, 9]])
        >>> hidden = torch.tensor([[[1.0], [2.0], [4.0]]])
        >>> pool_rows(hidden, torch.tensor([[-100, 8, 9]]), layout_of(ids))
        tensor([[3., 1.]])
    """
    device = hidden.device
    flat, row, position = hidden.flatten(0, 1), layout.row.flatten().to(device), layout.position.flatten().to(device)
    at = label_positions(labels, layout).flatten().to(device).nonzero().flatten()
    answer = torch.zeros(layout.rows, flat.shape[1], device=device).index_add_(0, row[at], flat[at].float())
    count = torch.bincount(row[at], minlength=layout.rows).clamp(min=1)
    first = torch.full((layout.rows,), -1, device=device)
    first.scatter_reduce_(0, row[at], position[at], "amin", include_self=False)
    before = ((row >= 0) & (position == first[row.clamp(min=0)] - 1)).nonzero().flatten()
    prompt = torch.zeros_like(answer)
    prompt[row[before]] = flat[before].float()
    return torch.cat([answer / count[:, None], prompt], 1)


class EncoderFeatures:
    """Vectors of a frozen sentence encoder, one per row, computed once.

    Args:
        encoder: A folder or hub name for `transformers.AutoModel`, whose last hidden state is averaged over tokens; or
            a callable from a list of texts to an array (texts, width).
        tokenizer: Of the rows, to turn their tokens back into text; special tokens are left out.
        device: Where the encoder runs; a callable sees to that itself.
        batch_size: Texts encoded at once.

    Raises:
        OptionError: There is no such folder or model, or no tokenizer.
    """

    def __init__(
        self, encoder: str | Path | Encoder, tokenizer: Any, device: torch.device | str = "cpu", batch_size: int = 32
    ) -> None:
        if tokenizer is None:
            raise OptionError(
                'features="encoder" turns tokens back into text, and there is no tokenizer: give the trainer '
                'processing_class=..., or use features="hidden"'
            )
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds its tokenizer
        self.batch_size = batch_size
        self._encode = encoder if callable(encoder) else _load(str(encoder), device)
        self._cache: dict[int, Tensor] = {}

    def __call__(self, input_ids: Tensor, layout: Layout, slots: Tensor) -> Tensor:
        """Features of the rows of a micro-batch.

        Args:
            input_ids: int64 (batch, sequence).
            layout: Where the rows lie.
            slots: int64 (rows,), the rows' names for the cache; a negative one has no features.

        Returns:
            float32 (rows, width), on the CPU.
        """
        names = slots.tolist()
        new = {slot: number for number, slot in enumerate(names) if slot >= 0 and slot not in self._cache}
        if new:
            rows = [input_ids[layout.row == number].tolist() for number in new.values()]
            self._cache |= dict(zip(new, self.of_tokens(rows), strict=True))
        found = [self._cache.get(slot) for slot in names]
        while len(self._cache) > _CACHED:
            del self._cache[next(iter(self._cache))]
        some = next((vector for vector in found if vector is not None), torch.empty(0))
        return torch.stack([torch.zeros_like(some) if vector is None else vector for vector in found])

    def of_tokens(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """float32 (rows, width), from token ids."""
        texts = [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
        parts = [
            self.of_texts(texts[start : start + self.batch_size]) for start in range(0, len(texts), self.batch_size)
        ]
        return torch.cat(parts)

    def of_texts(self, texts: list[str]) -> Tensor:
        """float32 (texts, width).

        Raises:
            ModelError: The encoder gave something else than one finite vector per text.
        """
        vectors = self._encode(texts)
        vectors = vectors if isinstance(vectors, Tensor) else torch.from_numpy(np.array(vectors))
        if vectors.dim() != 2 or vectors.shape[0] != len(texts) or not bool(torch.isfinite(vectors).all()):
            raise ModelError(
                f"the encoder gave a tensor of shape {tuple(vectors.shape)} for {len(texts)} texts; needed: one finite "
                "vector per text, (texts, width)"
            )
        return vectors.detach().float().cpu()


def _load(name: str, device: torch.device | str) -> Encoder:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        # safetensors only: nothing that is loaded may run code
        model = AutoModel.from_pretrained(name, trust_remote_code=False, use_safetensors=True).to(device).eval()
    except (OSError, ValueError) as error:
        raise OptionError(
            f"encoder={name!r}: {str(error).splitlines()[0]} Give the folder or hub name of a model with safetensors "
            "weights that AutoModel reads, or a callable from texts to an array."
        ) from error
    model.requires_grad_(False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    room = getattr(model.config, "max_position_embeddings", None) or _LONGEST
    longest = min(_LONGEST, room, tokenizer.model_max_length)

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        # an empty text has no token in some tokenizers
        given = tokenizer(
            [text or " ." for text in texts], padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(device)
        given.pop("token_type_ids", None)
        hidden = model(**given).last_hidden_state.float()
        real = given["attention_mask"][..., None].float()
        return (hidden * real).sum(1) / real.sum(1).clamp(min=1)

    return encode


class HiddenStateMeasurement(Measurement[HiddenState]):
    """Pooled hidden states of every row, from the training forward."""

    every_row = True

    def after_forward(self, batch: Batch, forward: Forward) -> Tensor:
        """See `Part.after_forward`: float32 (rows, 2 * width).

        Raises:
            ModelError: The model has shown no hidden state.
        """
        hidden = forward.hidden
        if hidden is None or hidden.shape[:2] != batch.labels.shape:
            raise ModelError(
                'features="hidden" reads the last hidden state of the training forward, and '
                + ("this model shows none" if hidden is None else f"this one is of shape {tuple(hidden.shape)}")
                + '. Use NeuralBDS(features="encoder", encoder=...) instead.'
            )
        return pool_rows(hidden, batch.labels, batch.layout)


class EncoderMeasurement(Measurement[EncoderVector]):
    """Vectors of a frozen sentence encoder, once per distinct row."""

    every_row = True

    def begin(self, run: Run) -> None:
        """See `Part.begin`: the encoder is loaded here."""
        super().begin(run)
        self._vectors = EncoderFeatures(self.need.encoder, run.tokenizer, run.device)

    def after_forward(self, batch: Batch, forward: Forward) -> Tensor:
        """See `Part.after_forward`: float32 (rows, width)."""
        return self._vectors(batch.input_ids, batch.layout, batch.slots)


def score_rows(
    scorer: Scorer,
    rows: SafetyData,
    *,
    model: Any = None,
    tokenizer: Any = None,
    encoder: str | Path | Encoder | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
) -> Scores:
    """How likely rows are harmful that no training run has seen.

    Args:
        scorer: From a training run: `safe_sched.NeuralBDS.scorer`, or `Scorer.load`.
        rows: In any schema that TRL's SFTTrainer takes; see `safe_sched.data.rows.read_rows` for where from.
        model: For a scorer of hidden states: the model that was trained with it, or its folder.
        tokenizer: Of the rows; needed unless they are token rows and the scorer reads hidden states. None with a folder
            as ``model``: the tokenizer there.
        encoder: For a scorer of an encoder's vectors: the same encoder as in training.
        batch_size: Rows run at once.
        max_length: Rows are cut to this many tokens, as in training; None to keep them whole.

    Returns:
        P(harmful) with its 5 % and 95 % quantiles over the posterior of the head, each float32 (rows,), in the order of
        the rows.

    Raises:
        DataError: A row has no schema that is known or no answer token, or its features are not those of the scorer.
        OptionError: The model or the encoder is missing.
        ModelError: The model shows no hidden state.
    """
    if isinstance(model, str | Path):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False) if tokenizer is None else tokenizer
        model = (
            AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False)
            if scorer.features == "hidden"
            else None
        )
    given = {"hidden": model, "encoder": encoder}[scorer.features]
    if given is None:
        name = {"hidden": "model", "encoder": "encoder"}[scorer.features]
        raise OptionError(f'this scorer reads features="{scorer.features}": give score_rows(..., {name}=...)')
    try:
        prepared = SafetySet(rows, tokenizer, max_length, batch_size, seed=0).rows
    except DataError as error:
        raise DataError(str(error).replace("safety row", "row")) from error
    if scorer.features == "encoder":
        features = EncoderFeatures(given, tokenizer, batch_size=batch_size).of_tokens([t.tolist() for t, _ in prepared])
    else:
        features = _hidden_features(given, prepared, batch_size)
    return scorer.score(features)


@torch.no_grad()
def _hidden_features(model: nn.Module, rows: Sequence[tuple[Tensor, Tensor]], batch_size: int) -> Tensor:
    inner = decoder(model)
    if inner is None or inner is model:
        raise ModelError(
            f"{type(model).__name__} has no decoder to take hidden states from; give a causal language model"
        )
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: rows[i][0].numel())  # like lengths together: little padding
    parts: list[Tensor] = []
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = [rows[i] for i in order[start : start + batch_size]]
            pad = torch.nn.utils.rnn.pad_sequence
            ids = pad([tokens for tokens, _ in chosen], batch_first=True).to(device)
            labels = pad([labels for _, labels in chosen], batch_first=True, padding_value=IGNORE_INDEX).to(device)
            mask = pad([torch.ones_like(tokens) for tokens, _ in chosen], batch_first=True).to(device)
            hidden = inner(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            parts.append(pool_rows(hidden, labels, layout_of(ids, mask)).cpu())
    finally:
        for module in training:
            module.training = True
    found = torch.cat(parts)
    return found[torch.tensor(order).argsort()]
