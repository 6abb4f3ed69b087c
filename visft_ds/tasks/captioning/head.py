"""Captioning: head, criterion and generation of the attentive LSTM ("Show, Attend and Tell", arXiv
1502.03044).

Letters: B images, h w patch grid, D backbone width, P cells of the pooled grid ("pixels" in the paper), T
caption length in word ids (`<start>` and `<end>` included), S = T - 1 steps, A attention width, E embedding
width, R recurrent width, V vocabulary size, K beams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.data.samples import Batch, Map
from visft_ds.ops import at_least_float32, autocast_dtype, autocast_to
from visft_ds.settings.task_schema import DecodingConfig
from visft_ds.tasks import Numbers
from visft_ds.tasks.captioning.config import CaptioningHeadConfig, CaptioningLoss
from visft_ds.tasks.captioning.data import CaptionTargets
from visft_ds.tasks.criterion import Denominators, Losses

DECODING = DecodingConfig()
_PAD = 0
#: Ids counted from the end of the vocabulary, see `tasks.vocabulary`.
_UNKNOWN = -3
_START = -2
_END = -1

#: Our names -> those of the published files (`interop.published`), the first whose beginning fits.
PUBLISHED_NAMES = {
    "encoder_att.": "attention.encoder_att.",
    "recurrence.decoder_att_weight": "attention.decoder_att.weight",
    "recurrence.decoder_att_bias": "attention.decoder_att.bias",
    "recurrence.full_att_weight": "attention.full_att.weight",
    "recurrence.full_att_bias": "attention.full_att.bias",
    "recurrence.f_beta_weight": "f_beta.weight",
    "recurrence.f_beta_bias": "f_beta.bias",
    "recurrence.": "decode_step.",
    "embedding.": "embedding.",
    "init_h.": "init_h.",
    "init_c.": "init_c.",
    "fc.": "fc.",
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
        attention_dim = options.attention_dim
        decoder_dim = options.decoder_dim
        self.vocabulary_size = vocabulary_size
        self.encoded_image_size = options.encoded_image_size
        self.encoder_att = nn.Linear(in_channels, attention_dim)
        self.embedding = nn.Embedding(vocabulary_size, options.embed_dim)
        self.init_h = nn.Linear(in_channels, decoder_dim)
        self.init_c = nn.Linear(in_channels, decoder_dim)
        self.recurrence = Recurrence(in_channels, attention_dim, options.embed_dim, decoder_dim)
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
        """Scores of captions, or the best caption of each image by beam search, from the last map.

        A beam's score is the plain sum of log-probabilities, without length normalisation, and finished beams
        keep their place among the K. `<pad>`, `<start>` and `<unk>` are never chosen, and there is no
        dropout, in training mode either. Among equal scores the choice is PyTorch's.

        The search always takes `max_length` + 1 steps: to stop as soon as all captions have ended, the host
        would wait for the device after each step, and under ZeRO-3 ranks would gather the weights at
        different steps.

        Args:
            captions: (B, T) int64, `<start>` and `<end>` included, whose words captions[:, 1:] are scored;
                None: captions are generated.
            lengths: (B,) of the captions.
            beam_size: K.
            max_length: the largest number of words, after which `<end>` is forced.
        """
        features = maps[-1].features
        with autocast_to(features.device, None):  # rounded, pooling would be most of the error of captions
            pixels = pool_valid(features, maps[-1].valid, self.encoded_image_size)
        keys = self.encoder_att(pixels)
        mean = pixels.mean(dim=1)
        hidden = self.init_h(mean)
        cell = self.init_c(mean)
        if captions is None:
            return GeneratedCaptions(self._search(pixels, keys, hidden, cell, beam_size, max_length))
        assert lengths is not None
        words = self.embedding(captions[:, :-1])
        states, attention, _ = self.recurrence(words, pixels, keys, hidden, cell)
        scores = at_least_float32(self.fc(self.dropout(states)))
        steps = torch.arange(1, captions.shape[1], device=lengths.device)
        past_end = (steps >= lengths[:, None]).unsqueeze(-1)
        scores = scores.masked_fill(past_end, 0)
        attention = attention.masked_fill(past_end, 0)
        return CaptioningOutput(scores, attention)

    @torch.no_grad()
    def _search(
        self,
        pixels: Tensor,
        keys: Tensor,
        hidden: Tensor,
        cell: Tensor,
        beams: int,
        max_length: int,
    ) -> Tensor:
        """The best caption of each image, (B, max_length + 2) ids. The tensors are as in
        `Recurrence.forward`.
        """
        images = len(pixels)
        size = self.vocabulary_size
        # Row b * K + k is beam k of image b.
        first_rows = torch.arange(images, device=pixels.device).unsqueeze(1) * beams  # (B, 1)
        of_images = (pixels, keys, hidden, cell)
        pixels, keys, hidden, cell = (tensor.repeat_interleave(beams, dim=0) for tensor in of_images)
        word = torch.full((images * beams,), size + _START, device=pixels.device)
        captions = word[:, None]  # of the beams so far
        ended = torch.zeros_like(word, dtype=torch.bool)
        # All beams begin alike, so in the first step only one of them may be continued.
        totals = at_least_float32(hidden).new_full((images, beams), -math.inf)
        totals[:, 0] = 0
        banned, stays, ends = self._rules(totals)
        for step in range(max_length + 1):
            embedded = self.embedding(word).unsqueeze(1)
            states, _, cell = self.recurrence(embedded, pixels, keys, hidden, cell)
            hidden = states[:, 0]
            scores = at_least_float32(self.fc(hidden)) + banned
            gains = scores.log_softmax(dim=-1)
            if step == max_length:
                gains = gains + ends
            gains = torch.where(ended.unsqueeze(-1), stays, gains)
            candidates = totals.unsqueeze(-1) + gains.view(images, beams, size)
            totals, chosen = candidates.flatten(start_dim=1).topk(beams)  # (B, K), of K * V
            totals = totals - totals[:, :1]  # relative to the best: small numbers keep their digits
            beam = chosen // size
            rows = (first_rows + beam).flatten()  # of the beams that are continued
            word = (chosen % size).flatten()
            ended = ended[rows] | (word == size + _END)
            hidden = hidden[rows]
            cell = cell[rows]
            captions = torch.cat((captions[rows], word[:, None]), dim=1)
        return captions[first_rows.squeeze(1)]  # the best beam comes first

    def _rules(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Terms (V,), 0 or minus infinity, of the scores of next words.

        Of all beams, in which `<pad>`, `<unk>` and `<start>` cannot follow; of an ended beam, which goes on
        with `<pad>`; and of the last step, in which nothing but `<end>` is possible. Slices, because a list
        of indices would be copied to the device.
        """
        banned = like.new_zeros(self.vocabulary_size)
        banned[: _PAD + 1] = -math.inf
        banned[_UNKNOWN:_END] = -math.inf
        stays = torch.full_like(banned, -math.inf)
        stays[_PAD] = 0
        ends = torch.full_like(banned, -math.inf)
        ends[_END] = 0
        return banned, stays, ends


class Recurrence(nn.Module):
    """All steps of the decoder: attention, gate and LSTM cell.

    They are a single module that owns all weights of a step, for three reasons. ZeRO-3 gathers weights when
    the module that owns them is called: once for all steps here, so that ranks whose captions differ in
    length still gather equally often. What depends on the words alone is computed for all steps at once. And
    the three products with the last hidden state become one.

    Names are those of the published files: `decoder_att` and `full_att` score the cells, `f_beta` is the gate
    on the attended features (arXiv 1502.03044, section 4.2.1; here one value for each channel).
    """

    def __init__(
        self,
        in_channels: int,
        attention_dim: int,
        embed_dim: int,
        decoder_dim: int,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.splits = (attention_dim, in_channels, 4 * decoder_dim)
        self.decoder_att_weight = _parameter(attention_dim, decoder_dim)
        self.decoder_att_bias = _parameter(attention_dim)
        self.full_att_weight = _parameter(1, attention_dim)
        self.full_att_bias = _parameter(1)
        self.f_beta_weight = _parameter(in_channels, decoder_dim)
        self.f_beta_bias = _parameter(in_channels)
        self.weight_ih = _parameter(4 * decoder_dim, embed_dim + in_channels)
        self.weight_hh = _parameter(4 * decoder_dim, decoder_dim)
        self.bias_ih = _parameter(4 * decoder_dim)
        self.bias_hh = _parameter(4 * decoder_dim)
        # Bounds are those of nn.Linear (1 / sqrt of the inputs) and nn.LSTMCell (1 / sqrt of the state).
        for name, parameter in self.named_parameters():
            bound = (attention_dim if name.startswith("full_att") else decoder_dim) ** -0.5
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self,
        embedded: Tensor,
        pixels: Tensor,
        keys: Tensor,
        hidden: Tensor,
        cell: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (B, S, R), attention (B, S, P) and the last cell state (B, R).

        embedded (B, S, E) words, pixels (B, P, D), keys (B, P, A), hidden and cell state (B, R) before the
        first step.
        """
        from_words = F.linear(embedded, self.weight_ih[:, : self.embed_dim], self.bias_ih)  # (B, S, 4 R)
        # Autocast would round these four in every step.
        from_pixels = _rounded(self.weight_ih[:, self.embed_dim :])
        weight = _rounded(torch.cat((self.decoder_att_weight, self.f_beta_weight, self.weight_hh)))
        bias = _rounded(torch.cat((self.decoder_att_bias, self.f_beta_bias, self.bias_hh)))
        pixels = _rounded(pixels)
        states = []
        attention = []
        for from_word in from_words.unbind(dim=1):
            # Both states stay float32, whatever the products are computed in.
            from_hidden = at_least_float32(F.linear(hidden, weight, bias))
            query, gate, from_state = from_hidden.split(self.splits, dim=1)
            matched = F.relu(keys + query.unsqueeze(1))
            energy = F.linear(matched, self.full_att_weight, self.full_att_bias)
            weights = at_least_float32(energy.squeeze(-1)).softmax(dim=1)  # (B, P)
            mean = torch.bmm(weights.to(pixels.dtype).unsqueeze(1), pixels)  # (B, 1, D)
            context = mean.squeeze(1) * gate.sigmoid()
            gates = from_word + from_state + F.linear(context, from_pixels)
            # In the order of nn.LSTMCell's weights.
            input_gate, forget_gate, new, output_gate = gates.chunk(4, dim=1)
            cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * new.tanh()
            hidden = output_gate.sigmoid() * cell.tanh()
            states.append(hidden)
            attention.append(weights)
        return torch.stack(states, dim=1), torch.stack(attention, dim=1), cell


def _parameter(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(size))


def _rounded(values: Tensor) -> Tensor:
    """In autocast's dtype."""
    return values.to(autocast_dtype(values.device) or values.dtype)


def pool_valid(features: Tensor, valid: Tensor, side: int) -> Tensor:
    """Adaptive average pooling of the valid part of each feature map: (B, side * side, D).

    features (B, D, h, w); valid (B, h, w) bool, a rectangle of at least a patch in the upper left corner.
    Cells are those of torch.nn.AdaptiveAvgPool2d on that rectangle. Averaging first columns and then rows is
    the same, as products with two small matrices.
    """
    batch, width, height = features.shape[:3]
    over_rows = _averages(valid.any(dim=2), side, features.dtype)  # (B, side, h)
    over_columns = _averages(valid.any(dim=1), side, features.dtype)  # (B, side, w)
    rows = features.flatten(start_dim=1, end_dim=2)  # (B, D * h, w)
    narrow = torch.bmm(rows, over_columns.transpose(1, 2))
    narrow = narrow.view(batch, width, height, side).permute(0, 2, 3, 1)  # (B, h, side, D)
    pooled = torch.bmm(over_rows, narrow.reshape(batch, height, side * width))
    return pooled.view(batch, side * side, width)


def _averages(valid: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """Matrices (B, side, n) that average the valid ones of n patches.

    v of an image's patches are `valid` (B, n); cell i averages those from floor(i v / side) to
    ceil((i + 1) v / side).
    """
    counts = valid.sum(dim=1, keepdim=True)
    cells = torch.arange(side, device=valid.device)
    first = (cells * counts // side).unsqueeze(-1)  # (B, side, 1)
    past_end = (cells + 1) * counts + side - 1
    last = (past_end // side).unsqueeze(-1)
    patches = torch.arange(valid.shape[1], device=valid.device)
    inside = (patches >= first) & (patches < last)
    return inside.to(dtype) / (last - first)


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
        self.weights: Numbers = {"ce": loss.ce, "attention": loss.attention}

    def count(self, batch: Batch) -> Numbers:
        lengths = batch.targets["captioning"].lengths
        tokens = (lengths - 1).sum()
        images = (lengths > 1).sum()
        return {"tokens": float(tokens), "images": float(images)}

    def __call__(
        self,
        output: CaptioningOutput,
        targets: CaptionTargets,
        loss_denominators: Denominators,
        image_ids: Tensor | None = None,
    ) -> Losses:
        words = targets.tokens[:, 1:]
        scores = at_least_float32(output.scores)
        steps = torch.arange(1, targets.tokens.shape[1], device=words.device)
        inside = steps < targets.lengths[:, None]  # (B, S)
        tokens = loss_denominators["tokens"]
        has_caption = targets.lengths > 1
        return {
            "ce": self.loss_words(scores, words, inside) / tokens,
            "attention": self.loss_attention(output.attention, has_caption) / loss_denominators["images"],
            "top5_accuracy": self.top5_accuracy(scores.detach(), words, inside) / tokens,
        }

    def loss_words(self, scores: Tensor, words: Tensor, inside: Tensor) -> Tensor:
        """Sum of the cross-entropies of words (B, S) that are `inside` a caption; scores (B, S, V)."""
        terms = F.cross_entropy(scores.flatten(end_dim=1), words.flatten(), reduction="none")
        return terms.view_as(words).masked_fill(~inside, 0).sum()

    def loss_attention(self, attention: Tensor, has_caption: Tensor) -> Tensor:
        """Sum over images of their mean penalty; attention (B, S, P), has_caption (B,) bool."""
        over_steps = at_least_float32(attention).sum(dim=1)
        penalty = (1 - over_steps).square().mean(dim=1)  # (B,)
        return (penalty * has_caption).sum()

    def top5_accuracy(self, scores: Tensor, words: Tensor, inside: Tensor) -> Tensor:
        """100 times the words `inside` captions than which fewer than five have a higher score."""
        of_words = scores.gather(2, words.unsqueeze(-1))
        better = (scores > of_words).sum(dim=-1)
        return 100 * ((better < 5) & inside).sum()
