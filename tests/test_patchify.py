"""patchify and its relatives against loops over pixels."""

import torch

from util.layers.patchify import gather_patches, normalize_patches, patchify, unpatchify


def test_patchify_matches_pixel_loop():
    B, C, H, W, p = 2, 4, 6, 9, 3
    imgs = torch.randn(B, C, H, W)
    patches = patchify(imgs, p)
    assert patches.shape == (B, 6, p * p * C)
    for y in range(H):
        for x in range(W):
            for c in range(C):
                patch, entry = y // p * (W // p) + x // p, (y % p * p + x % p) * C + c
                assert torch.equal(patches[:, patch, entry], imgs[:, c, y, x])
    assert torch.equal(unpatchify(patches, p, (2, 3)), imgs)


def test_gather_patches_matches_patchify():
    imgs = torch.randn(3, 2, 8, 12)
    ids = torch.tensor([[5, 0], [1, 1], [3, 4]])
    gathered = gather_patches(imgs, ids, 4).permute(0, 1, 3, 4, 2).flatten(2)
    for b in range(3):
        assert torch.equal(gathered[b], patchify(imgs, 4)[b, ids[b]])


def test_normalize_patches_matches_formula():
    patches = torch.randn(2, 3, 12) * 5 + 2
    expected = torch.empty_like(patches)
    for b in range(2):
        for n in range(3):
            row = patches[b, n]
            var = ((row - row.mean()) ** 2).sum() / 11
            expected[b, n] = (row - row.mean()) / (var + 1e-6) ** 0.5
    torch.testing.assert_close(normalize_patches(patches), expected, atol=1e-6, rtol=1e-5)
