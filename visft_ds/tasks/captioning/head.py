"""Captioning: head, criterion and generation of the attentive LSTM ("Show, Attend and Tell", arXiv
1502.03044).

Letters: B images, h w patch grid, D backbone width, P cells of the pooled grid ("pixels" in the paper), T
caption length in word ids (`<start>` and `<end>` included), S = T - 1 steps, A attention width, E embedding
width, R recurrent width, V vocabulary size, K beams.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.data.samples import Batch, Map
from visft_ds.ops import at_least_float32, autocast_dtype, autocast_to
from visft_ds.settings.task_schema import DecodingConfig
from visft_ds.tasks.captioning.config import CaptioningHeadConfig, CaptioningLoss
from visft_ds.tasks.captioning.data import CaptionTargets

DECODING = DecodingConfig()
_PAD = 0
#: Ids counted from the end of the vocabulary, see `tasks.vocabulary`.
_UNKNOWN, _START, _END = -3, -2, -1

#: Parameter of `CaptioningHead` -> its name in the published files, behind `visft_heads.caption_decoder.`.
PUBLISHED_NAMES: Mapping[str, str] = {
    **{f"encoder_att.{kind}": f"attention.encoder_att.{kind}" for kind in ("weight", "bias")},
    **{f"recurrence.decoder_att_{kind}": f"attention.decoder_att.{kind}" for kind in ("weight", "bias")},
    **{f"recurrence.full_att_{kind}": f"attention.full_att.{kind}" for kind in ("weight", "bias")},
    **{f"recurrence.f_beta_{kind}": f"f_beta.{kind}" for kind in ("weight", "bias")},
    **{
        f"recurrence.{name}": f"decode_step.{name}"
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    },
    "embedding.weight": "embedding.weight",
    **{
        f"{name}.{kind}": f"{name}.{kind}"
        for name in ("init_h", "init_c", "fc")
        for kind in ("weight", "bias")
    },
}


@dataclass(frozen=True)
class CaptioningOutput:
    """Answer to given captions at each step, in the order of the batch; zero after the end of a caption."""

    scores: Tensor  #: (B, S, V) logits of the next word: those of step t follow the first t + 1 ids
    attention: Tensor  #: (B, S, P) weights over the pooled cells in row-major order, sum 1


@dataclass(frozen=True)
class GeneratedCaptions:
    """Captions that the head made."""

    tokens: Tensor  #: (B, T) int64 ids, `<start> word ... <end>`, filled up with 0


class CaptioningHead(nn.Module):
    """Feature map -> scores of the next word, step by step, with the attention that led to them.

    The published ViSFT head: average pooling to a square of `encoded_image_size` cells a side, LSTM cell
    whose input is the embedded last word and a gated, attention-weighted mean of the cells, initial state
    from the mean cell, dropout before the word layer. `vocabulary_size` includes the special ids
    (`Vocabulary.size`). Initialisation: U(-0.1, 0.1) for embedding and word layer, whose bias is 0; PyTorch's
    defaults elsewhere.

    With captions it predicts each next word from the true previous ones (teacher forcing); without, it
    generates them.
    """

    def __init__(self, in_channels: int, options: CaptioningHeadConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.vocabulary_size, self.encoded_image_size = vocabulary_size, options.encoded_image_size
        attention_dim, embed_dim, decoder_dim = options.attention_dim, options.embed_dim, options.decoder_dim
        self.encoder_att = nn.Linear(in_channels, attention_dim)
        self.embedding = nn.Embedding(vocabulary_size, embed_dim)
        self.init_h = nn.Linear(in_channels, decoder_dim)
        self.init_c = nn.Linear(in_channels, decoder_dim)
        self.recurrence = Recurrence(in_channels, attention_dim, embed_dim, decoder_dim)
        self.dropout = nn.Dropout(options.dropout)
        self.fc = nn.Linear(decoder_dim, vocabulary_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.fc.weight, -0.1, 0.1)
        nn.init.zeros_(self.fc.bias)

    def forward(
        self,
        maps: Sequence[Map],
        captions: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        beam_size: int = DECODING.beam_size,
        max_length: int = DECODING.max_length,
    ) -> CaptioningOutput | GeneratedCaptions:
        """Scores of captions, or generated ones, from the last map.

        With `captions` (B, T) int64 and `lengths` (B,), `<start>` and `<end>` included: scores of captions[:,
        1:].
        Without: the best caption of each image by beam search. `max_length` is the largest number of words,
        after which `<end>` is forced. A beam's score is the plain sum of log-probabilities, without length
        normalisation, and finished beams keep their place among the K. `<pad>`, `<start>` and `<unk>` are
        never chosen, and there is no dropout, in training mode either. Among equal scores the choice is
        PyTorch's.

        There are always `max_length` + 1 steps: to stop as soon as all captions have ended, the host would
        wait for the device after each step, and under ZeRO-3 ranks would gather the weights at different
        steps.
        """
        features, valid = maps[-1].features, maps[-1].valid
        with autocast_to(features.device, None):  # rounded, pooling would be most of the error of captions
            pixels = pool_valid(features, valid, self.encoded_image_size)
        mean = pixels.mean(dim=1)
        start = pixels, self.encoder_att(pixels), self.init_h(mean), self.init_c(mean)
        if captions is None:
            return GeneratedCaptions(self._search(*start, beam_size, max_length))
        assert lengths is not None and captions.shape[1] >= 2, (lengths, captions.shape)
        hidden, attention, _ = self.recurrence(self.embedding(captions[:, :-1]), *start)
        scores = at_least_float32(self.fc(self.dropout(hidden)))
        past_end = (torch.arange(1, captions.shape[1], device=lengths.device) >= lengths[:, None]).unsqueeze(
            -1
        )
        return CaptioningOutput(scores.masked_fill(past_end, 0), attention.masked_fill(past_end, 0))

    @torch.no_grad()
    def _search(
        self, pixels: Tensor, keys: Tensor, hidden: Tensor, cell: Tensor, beams: int, max_length: int
    ) -> Tensor:
        """The best caption of each image, (B, max_length + 2) ids. The tensors are as in
        `Recurrence.forward`.
        """
        images, size, end = len(pixels), self.vocabulary_size, self.vocabulary_size + _END
        # Row b * K + k is beam k of image b.
        start = (pixels, keys, hidden, cell)
        pixels, keys, hidden, cell = (values.repeat_interleave(beams, dim=0) for values in start)
        first = torch.arange(images, device=pixels.device).unsqueeze(1) * beams  # (B, 1)
        word = torch.full((images * beams,), size + _START, device=pixels.device)
        ended = torch.zeros_like(word, dtype=torch.bool)
        # All beams begin alike, so in the first step only one of them may be continued.
        totals = at_least_float32(hidden).new_full((images, beams), -math.inf)
        totals[:, 0] = 0
        banned = totals.new_zeros(size)  # `<pad>`, `<unk>` and `<start>` cannot follow
        # Slices, because a list of indices would be copied to the device.
        banned[: _PAD + 1] = -math.inf
        banned[_UNKNOWN:_END] = -math.inf
        stays = totals.new_full((size,), -math.inf)  # an ended beam goes on with <pad>, at no cost
        stays[_PAD] = 0
        ends = totals.new_full((size,), -math.inf)  # in the last step nothing but <end> is possible
        ends[end] = 0
        captions = word[:, None]  # of the beams so far
        for step in range(max_length + 1):
            states, _, cell = self.recurrence(self.embedding(word).unsqueeze(1), pixels, keys, hidden, cell)
            gains = (at_least_float32(self.fc(states[:, 0])) + banned).log_softmax(dim=-1)
            gains = gains if step < max_length else gains + ends
            gains = torch.where(ended.unsqueeze(-1), stays, gains).view(images, beams, size)
            totals, chosen = (
                (totals.unsqueeze(-1) + gains).flatten(start_dim=1).topk(beams)
            )  # (B, K), of K * V
            totals = totals - totals[:, :1]  # relative to the best: small numbers keep their digits
            rows = (first + chosen // size).flatten()  # the beams that are continued
            word = (chosen % size).flatten()
            ended = ended[rows] | (word == end)
            hidden, cell = states[rows, 0], cell[rows]
            captions = torch.cat((captions[rows], word[:, None]), dim=1)
        return captions[first.squeeze(1)]  # the best beam comes first


class Recurrence(nn.Module):
    """All steps of the decoder: attention, gate and LSTM cell.

    They are a single module that owns all weights of a step, for three reasons. ZeRO-3 gathers weights when
    the module that owns them is called: once for all steps here, so that ranks whose captions differ in
    length still gather equally often. What depends on the words alone is computed for all steps at once. And
    the three products with the last hidden state become one.

    Names are those of the published files: `decoder_att` and `full_att` score the cells, `f_beta` is the gate
    on the attended features (arXiv 1502.03044, section 4.2.1; here one value for each channel).
    """

    def __init__(self, in_channels: int, attention_dim: int, embed_dim: int, decoder_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.splits = (attention_dim, in_channels, 4 * decoder_dim)
        self.decoder_att_weight = nn.Parameter(torch.empty(attention_dim, decoder_dim))
        self.decoder_att_bias = nn.Parameter(torch.empty(attention_dim))
        self.full_att_weight = nn.Parameter(torch.empty(1, attention_dim))
        self.full_att_bias = nn.Parameter(torch.empty(1))
        self.f_beta_weight = nn.Parameter(torch.empty(in_channels, decoder_dim))
        self.f_beta_bias = nn.Parameter(torch.empty(in_channels))
        self.weight_ih = nn.Parameter(torch.empty(4 * decoder_dim, embed_dim + in_channels))
        self.weight_hh = nn.Parameter(torch.empty(4 * decoder_dim, decoder_dim))
        self.bias_ih = nn.Parameter(torch.empty(4 * decoder_dim))
        self.bias_hh = nn.Parameter(torch.empty(4 * decoder_dim))
        # Bounds are those of nn.Linear (1 / sqrt of the inputs) and nn.LSTMCell (1 / sqrt of the state).
        for name, parameter in self.named_parameters():
            bound = (attention_dim if name.startswith("full_att") else decoder_dim) ** -0.5
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, embedded: Tensor, pixels: Tensor, keys: Tensor, hidden: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (B, S, R), attention (B, S, P) and the last cell state (B, R).

        embedded (B, S, E) words, pixels (B, P, D), keys (B, P, A), hidden and cell state (B, R) before the
        first step.
        """
        from_words = F.linear(embedded, self.weight_ih[:, : self.embed_dim], self.bias_ih)  # (B, S, 4 R)
        from_pixels = self.weight_ih[:, self.embed_dim :]
        weight = torch.cat((self.decoder_att_weight, self.f_beta_weight, self.weight_hh))
        bias = torch.cat((self.decoder_att_bias, self.f_beta_bias, self.bias_hh))
        # Autocast would round them in every step.
        given = weight, bias, from_pixels, pixels
        weight, bias, from_pixels, pixels = (one.to(autocast_dtype(one.device) or one.dtype) for one in given)
        states, attention = [], []
        for word in from_words.unbind(dim=1):
            # Both states stay float32, whatever the products are computed in.
            query, gate, from_state = at_least_float32(F.linear(hidden, weight, bias)).split(
                self.splits, dim=1
            )
            energy = F.linear(F.relu(keys + query.unsqueeze(1)), self.full_att_weight, self.full_att_bias)
            weights = at_least_float32(energy.squeeze(-1)).softmax(dim=1)  # (B, P)
            context = (
                torch.bmm(weights.to(pixels.dtype).unsqueeze(1), pixels).squeeze(1) * gate.sigmoid()
            )  # (B, D)
            # In the order of nn.LSTMCell's weights.
            gates = word + from_state + F.linear(context, from_pixels)
            input_gate, forget_gate, new, output_gate = gates.chunk(4, dim=1)
            cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * new.tanh()
            hidden = output_gate.sigmoid() * cell.tanh()
            states.append(hidden)
            attention.append(weights)
        return torch.stack(states, dim=1), torch.stack(attention, dim=1), cell


def pool_valid(features: Tensor, valid: Tensor, grid: int) -> Tensor:
    """Adaptive average pooling of the valid part of each feature map: (B, grid * grid, D).

    features (B, D, h, w); valid (B, h, w) bool, a rectangle of at least a patch in the upper left corner.
    Cells are those of torch.nn.AdaptiveAvgPool2d on that rectangle: cell i averages its n rows from floor(i n
    / grid) to ceil((i + 1) n / grid). Averaging first columns and then rows is the same, as products with two
    small matrices.
    """
    batch, width, height = features.shape[:3]
    cells, averages = torch.arange(grid, device=features.device), []
    for axis in (1, 2):
        # Row i of a matrix (B, grid, h or w) averages the patches of cell i, among the valid ones.
        counts = valid.any(dim=3 - axis).sum(dim=1, keepdim=True)
        first = (cells * counts // grid).unsqueeze(-1)  # (B, grid, 1)
        last = (((cells + 1) * counts + grid - 1) // grid).unsqueeze(-1)
        patches = torch.arange(valid.shape[axis], device=features.device)
        averages.append(((patches >= first) & (patches < last)).to(features.dtype) / (last - first))
    rows, columns = averages
    narrow = torch.bmm(features.flatten(start_dim=1, end_dim=2), columns.transpose(1, 2))  # (B, D * h, grid)
    narrow = narrow.view(batch, width, height, grid).permute(0, 2, 3, 1)  # (B, h, grid, D)
    return torch.bmm(rows, narrow.reshape(batch, height, grid * width)).view(batch, grid * grid, width)


class CaptioningCriterion:
    """Cross-entropy of the words and the doubly stochastic attention penalty (arXiv 1502.03044, section
    4.2.1).

    Calling it gives *unweighted* losses by name; `weights` holds the factor of each.

    - `ce`: mean cross-entropy over all ids to be predicted, `<end>` included.
    - `attention`: mean over images and cells of (1 - sum of the cell's attention over the caption)^2.
    - `top5_accuracy`, for the log only: percentage of the ids for which fewer than five ids have a higher
      score.

    Images without a caption take no part.
    """

    def __init__(self, head: CaptioningHeadConfig, loss: CaptioningLoss) -> None:
        self.weights: dict[str, float] = {"ce": loss.ce, "attention": loss.attention}

    def count(self, batch: Batch) -> dict[str, float]:
        lengths = batch.targets["captioning"].lengths
        return {"tokens": float((lengths - 1).sum()), "images": float((lengths > 1).sum())}

    def __call__(
        self,
        output: CaptioningOutput,
        targets: CaptionTargets,
        loss_denominators: Mapping[str, Tensor],
        image_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        wanted = targets.tokens[:, 1:]
        assert output.scores.shape[:2] == wanted.shape, (output.scores.shape, wanted.shape)
        scores, attention = at_least_float32(output.scores), at_least_float32(output.attention)
        inside = torch.arange(1, targets.tokens.shape[1], device=wanted.device) < targets.lengths[:, None]
        terms = F.cross_entropy(scores.flatten(end_dim=1), wanted.flatten(), reduction="none").view_as(wanted)
        uneven = (1 - attention.sum(dim=1)).square().mean(dim=1)  # (B,)
        losses = {
            "ce": terms.masked_fill(~inside, 0).sum() / loss_denominators["tokens"],
            "attention": (uneven * (targets.lengths > 1)).sum() / loss_denominators["images"],
        }
        scores = scores.detach()
        better = (scores > scores.gather(2, wanted.unsqueeze(-1))).sum(dim=-1)
        return losses | {"top5_accuracy": 100 * ((better < 5) & inside).sum() / loss_denominators["tokens"]}
