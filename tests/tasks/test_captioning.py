"""The captioning head, its generation and its losses."""

from __future__ import annotations

import math
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.options import criterion_of, head_of
from tests.tasks.cases import batch_of, denominators, map_of, published_caption_name
from visft_ds.tasks import TASKS
from visft_ds.tasks.captioning.data import CaptionTargets
from visft_ds.tasks.captioning.head import CaptioningHead, GeneratedCaptions
from visft_ds.tasks.vocabulary import Vocabulary

D, SIZE, GRID = 6, 9, 3  # ids: 1..5 words, 6 <unk>, 7 <start>, 8 <end>
START, END = SIZE - 2, SIZE - 1
#: float64: sums in another order differ by rounding only.
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def small_head(size: int = SIZE, dropout: float = 0.0) -> CaptioningHead:
    head = head_of(
        "captioning",
        D,
        vocabulary_size=size,
        attention_dim=5,
        embed_dim=4,
        decoder_dim=7,
        encoded_image_size=GRID,
        dropout=dropout,
    ).double()
    # Larger weights than at the start of a training: no part of the head is close to linear, words depend on
    # the image.
    for name, parameter in head.named_parameters():
        parameter.data.mul_(20 if name in ("embedding.weight", "fc.weight") else 3)
    return head


def feature_maps(images: int) -> tuple[Tensor, Tensor]:
    """Maps (images, D, 5, 4), of which the last image fills 4 x 2 cells only."""
    valid = torch.ones(images, 5, 4, dtype=torch.bool)
    valid[-1, 4:] = False
    valid[-1, :, 2:] = False
    return torch.randn(images, D, 5, 4, dtype=torch.float64), valid


def caption_batch(*lengths: int) -> CaptionTargets:
    """Random captions of these lengths, <start> and <end> included; `<unk>` may occur."""
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.tensor([START, *torch.randint(1, 7, (length - 1,)).tolist()])
        if length > 1:
            row[length - 1] = END
    return CaptionTargets(tokens, torch.tensor(lengths), ((),) * len(lengths))


class PlainHead(nn.Module):
    """The head as the paper and the published code have it: one image, one step at a time, one layer per
    product.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"encoder_att": nn.Linear(D, 5), "decoder_att": nn.Linear(7, 5), "full_att": nn.Linear(5, 1)}
        )
        self.embedding = nn.Embedding(SIZE, 4)
        self.decode_step = nn.LSTMCell(4 + D, 7)
        self.init_h, self.init_c = nn.Linear(D, 7), nn.Linear(D, 7)
        self.f_beta, self.fc = nn.Linear(7, D), nn.Linear(7, SIZE)
        self.double()

    def forward(self, feature: Tensor, words: list[int]) -> tuple[Tensor, Tensor]:
        """feature (D, h, w) without padding -> scores (steps, V), attention (steps, P); one step per word
        given.
        """
        pixels = nn.AdaptiveAvgPool2d(GRID)(feature).flatten(1).T
        hidden, cell = self.init_h(pixels.mean(0)), self.init_c(pixels.mean(0))
        scores, attention = [], []
        for word in words:
            mixed = self.attention["encoder_att"](pixels) + self.attention["decoder_att"](hidden)
            weights = self.attention["full_att"](mixed.relu()).softmax(dim=0)  # (P, 1)
            seen = (weights * pixels).sum(0) * self.f_beta(hidden).sigmoid()
            hidden, cell = self.decode_step(torch.cat([self.embedding.weight[word], seen]), (hidden, cell))
            scores.append(self.fc(hidden))
            attention.append(weights.squeeze(1))
        return torch.stack(scores), torch.stack(attention)


def plain_copy(head: CaptioningHead) -> PlainHead:
    plain = PlainHead()
    plain.load_state_dict({published_caption_name(name): value for name, value in head.state_dict().items()})
    return plain


def test_equal_to_one_image_and_step_at_a_time() -> None:
    """Outputs and all gradients; captions in no order, one with nothing to predict, one map with padding."""
    head = small_head()
    plain = plain_copy(head)
    (features, valid), targets = feature_maps(4), caption_batch(4, 7, 1, 5)
    features.requires_grad_()
    output = head([map_of(features, valid)], targets.tokens, targets.lengths)
    assert output.scores.shape == (4, 6, SIZE)
    assert output.attention.shape == (4, 6, GRID**2)
    factors = torch.randn_like(output.scores), torch.randn_like(output.attention)
    ((output.scores * factors[0]).sum() + (output.attention * factors[1]).sum()).backward()
    own_grads = [features.grad, *(parameter.grad for parameter in head.parameters())]

    copy = features.detach().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for image, length in enumerate(targets.lengths.tolist()):
        assert not output.scores[image, length - 1 :].any()
        assert not output.attention[image, length - 1 :].any()
        if length > 1:
            feature = copy[image] if image < 3 else copy[image, :, :4, :2]
            scores, attention = plain(feature, targets.tokens[image, : length - 1].tolist())
            torch.testing.assert_close(output.scores[image, : length - 1], scores, **EXACT)
            torch.testing.assert_close(output.attention[image, : length - 1], attention, **EXACT)
            total = total + (scores * factors[0][image, : length - 1]).sum()
            total = total + (attention * factors[1][image, : length - 1]).sum()
    total.backward()
    grads = {name: parameter.grad for name, parameter in plain.named_parameters()}
    expected = [copy.grad, *(grads[published_caption_name(name)] for name, _ in head.named_parameters())]
    torch.testing.assert_close(own_grads, expected, **EXACT)


def test_shared_weights_are_used_once_whatever_the_length_of_the_captions() -> None:
    """ZeRO-3 gathers weights when their owner is called; ranks with other captions must gather equally
    often.
    """
    head = small_head()
    features, valid = feature_maps(2)
    owners = {name: module for name, module in head.named_modules() if list(module.parameters(recurse=False))}
    calls: list[str] = []
    for name, module in owners.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    seen = []
    for targets in (caption_batch(3, 2), caption_batch(7, 9)):
        calls.clear()
        head([map_of(features, valid)], targets.tokens, targets.lengths)
        seen.append(list(calls))
    assert seen[0] == seen[1]
    assert sorted(seen[0]) == sorted(owners)


def generated(head: CaptioningHead, features: Tensor, valid: Tensor, **decoding: int) -> list[list[int]]:
    """Ids of the words of each image's caption."""
    rows: list[list[int]] = head([map_of(features, valid)], **decoding).tokens.tolist()
    return [row[1 : row.index(head.vocabulary_size - 1)] for row in rows]


@pytest.mark.parametrize("beams", [1, 3])
def test_generated_captions_are_well_formed_and_the_same_alone(beams: int) -> None:
    torch.manual_seed(1)  # a head whose captions have many lengths, up to the longest allowed
    head = small_head().eval()
    head.fc.bias.data[[0, 6, 7]] += 20  # make it want what it must not say
    features, valid = feature_maps(24)
    tokens = head([map_of(features, valid)], beam_size=beams, max_length=9).tokens
    assert tokens.shape == (24, 11) and (tokens[:, 0] == START).all()
    captions = generated(head, features, valid, beam_size=beams, max_length=9)
    assert len({len(caption) for caption in captions}) > 1 and {*chain(*captions)} <= {1, 2, 3, 4, 5}
    for image in range(3):
        here = slice(image, image + 1)
        assert generated(head, features[here], valid[here], beam_size=beams, max_length=9) == captions[here]


@pytest.mark.parametrize("width", [1, 3, 31])
def test_it_is_a_beam_search(width: int) -> None:
    """Against a search written for one image: keep the best K of all continuations, ended ones among them."""
    torch.manual_seed(1)  # a head whose captions differ from image to image
    head = small_head().eval()
    features, valid = feature_maps(4)
    for image, caption in enumerate(generated(head, features, valid, beam_size=width, max_length=4)):
        feature, mask = features[image : image + 1], valid[image : image + 1]
        beams: list[tuple[float, list[int], bool]] = [(0.0, [], False)]
        for step in range(5):
            grown = [beam for beam in beams if beam[2]]
            for score, words, ended in beams:
                if not ended:
                    ids = torch.tensor([[START, *words, END]])
                    with torch.no_grad():
                        last = head([map_of(feature, mask)], ids, torch.tensor([len(words) + 2])).scores[
                            0, -1
                        ]
                    last[[0, 6, 7]] = -math.inf
                    gains = last.log_softmax(0).tolist()
                    grown.append((score + gains[END], words, True))
                    if step < 4:
                        grown += [(score + gains[word], [*words, word], False) for word in range(1, 6)]
            beams = sorted(grown, key=lambda beam: -beam[0])[:width]
        assert caption == beams[0][1]


def test_losses_by_their_definition() -> None:
    head = small_head()
    (features, valid), targets = feature_maps(4), caption_batch(4, 6, 1, 2)
    criterion = criterion_of("captioning", attention=0.5)
    assert criterion.count(batch_of(4, {"captioning": targets})) == {"tokens": 3 + 5 + 0 + 1, "images": 3}
    output = head([map_of(features, valid)], targets.tokens, targets.lengths)
    losses = criterion(output, targets, denominators("captioning", criterion, targets))
    rows = [(image, step) for image in range(4) for step in range(int(targets.lengths[image]) - 1)]
    logits = torch.stack([output.scores[image, step] for image, step in rows])
    expected = torch.tensor([int(targets.tokens[image, step + 1]) for image, step in rows])
    torch.testing.assert_close(losses["ce"], F.cross_entropy(logits, expected), **EXACT)
    uneven = torch.stack([(1 - output.attention[image].sum(0)) ** 2 for image in (0, 1, 3)])
    torch.testing.assert_close(losses["attention"], uneven.mean(), **EXACT)
    top5 = (logits.topk(5).indices == expected[:, None]).any(1).double().mean() * 100
    torch.testing.assert_close(losses["top5_accuracy"], top5, **EXACT)
    assert criterion.weights == {"ce": 1.0, "attention": 0.5}
    assert losses.keys() - criterion.weights.keys() == {"top5_accuracy"}


def test_mean_over_micro_batches_is_the_loss_of_the_global_batch() -> None:
    head = small_head()
    features, valid = feature_maps(6)
    targets, criterion = caption_batch(3, 9, 2, 5, 1, 4), criterion_of("captioning")

    def losses_of(images: slice, parts: int) -> dict[str, Tensor]:
        own = targets.lengths[images]
        tokens = targets.tokens[
            images, : max(2, int(own.max()))
        ]  # each micro-batch is as long as its longest caption
        part = CaptionTargets(tokens, own, ())
        output = head([map_of(features[images], valid[images])], part.tokens, part.lengths)
        return criterion(output, part, denominators("captioning", criterion, targets, parts=parts))

    def gradients(losses: dict[str, Tensor]) -> list[Tensor]:
        loss = sum(weight * losses[name] for name, weight in criterion.weights.items())
        return list(torch.autograd.grad(loss, list(head.parameters())))

    whole = losses_of(slice(0, 6), 1)
    parts = [losses_of(slice(start, start + 2), 3) for start in (0, 2, 4)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts) / 3, value, **EXACT)
    means = [sum(grads) / 3 for grads in zip(*map(gradients, parts), strict=True)]
    torch.testing.assert_close(means, gradients(whole), **EXACT)


def test_a_micro_batch_without_captions_trains_nothing_but_stays_in_the_graph() -> None:
    head = small_head()
    (features, valid), criterion = feature_maps(2), criterion_of("captioning")
    targets = CaptionTargets(torch.tensor([[START, 0]] * 2), torch.tensor([1, 1]), ((), ()))
    output = head([map_of(features, valid)], targets.tokens, targets.lengths)
    one = torch.ones((), dtype=torch.float64)
    losses = criterion(output, targets, {"tokens": one, "images": one})
    assert losses == {"ce": 0, "attention": 0, "top5_accuracy": 0}
    (losses["ce"] + losses["attention"]).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


def test_results_are_of_real_images() -> None:
    vocabulary = Vocabulary(("a", "cat", "on", "the", "mat"))
    said = GeneratedCaptions(torch.tensor([[7, 1, 2, 8, 0], [7, 8, 0, 0, 0], [7, 5, 5, 5, 8]]))
    results = TASKS["captioning"].results(
        said, batch_of(3, real=torch.tensor([True, True, False])), vocabulary
    )
    assert results == [{"image_id": 1, "caption": "a cat"}, {"image_id": 2, "caption": ""}]
