"""Masks: sizes rounded as published, three disjoint sets, uniform over patches."""

import pytest
import torch

from util.layers.masking import gather_tokens, num_visible_and_predicted, random_masking


@pytest.mark.parametrize(
    "num_patches, mask_ratio, kept, expected",
    [(196, 0.75, 0.25, (49, 49)), (400, 0.9, 0.8, (39, 322)), (196, 0.9, 0.3, (19, 60))],
)
def test_counts_are_rounded_as_published(num_patches, mask_ratio, kept, expected):
    assert num_visible_and_predicted(num_patches, mask_ratio, kept) == expected


@pytest.mark.parametrize("ratios", [(0, 0.5), (1, 0.5), (0.75, 0), (0.5, 0.6), (0.99, 0.5)])
def test_impossible_ratios_are_refused(ratios):
    with pytest.raises(ValueError, match=r"ratio"):
        num_visible_and_predicted(16, *ratios)


def test_visible_and_predicted_sets():
    noise = torch.rand(4, 20)
    masking = random_masking(noise, 5, 8)
    for b in range(4):
        visible, predicted = set(masking.ids_keep[b].tolist()), masking.ids_pred[b].tolist()
        assert len(visible) == 5 and len(set(predicted)) == 8 and not visible & set(predicted)
        assert predicted == sorted(predicted)
        smallest = sorted(range(20), key=lambda i: noise[b, i].item())
        assert masking.ids_keep[b].tolist() == smallest[:5]
        assert set(predicted) == set(smallest[12:])
        assert masking.mask[b].nonzero().flatten().tolist() == predicted
    x = torch.randn(4, 20, 3)
    shuffled = gather_tokens(x, masking.order)
    assert torch.equal(gather_tokens(shuffled, masking.ids_restore), x)


def test_predicted_patches_are_uniform():
    torch.manual_seed(0)
    masking = random_masking(torch.rand(4000, 16), 4, 8)
    fraction = masking.mask.mean(dim=0)  # expected 0.5, std 0.0079
    assert (fraction - 0.5).abs().max() < 4.5 * 0.0079
