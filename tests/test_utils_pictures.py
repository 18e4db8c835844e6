import torch

from utils.pictures import DARKENED, GAP, OUTLINE, draw_selection, draw_share, stack_samples

MEAN, STD = [0.4, 0.5, 0.6], [0.5, 0.25, 0.2]


def sample(grid=(4, 2), size=(32, 16), modalities=3):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(modalities, 3, *size, generator=generator)
    images = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    cells = grid[0] * grid[1]
    scores = torch.rand(modalities, cells, generator=generator)
    mask = torch.zeros(modalities, cells, dtype=torch.bool)
    mask[0, 0] = mask[1, 3] = mask[2] = True
    return pixels, images, mask, scores


def panel(picture, row, column, height, width):
    top, left = row * (height + GAP), column * (width + GAP)
    return picture[:, top : top + height, left : left + width].float() / 255


def test_panels_by_hand():
    pixels, images, mask, scores = sample()
    picture = draw_selection(images, mask, scores, (4, 2), MEAN, STD)
    assert picture.dtype == torch.uint8 and picture.shape == (3, 3 * 32 + 2 * GAP, 3 * 16 + 2 * GAP)
    assert (picture[:, 32 : 32 + GAP] == 255).all() and (picture[:, :, 16 : 16 + GAP] == 255).all()
    for row in range(3):
        torch.testing.assert_close(panel(picture, row, 0, 32, 16), pixels[row], rtol=0, atol=1 / 255)
    outline = torch.tensor(OUTLINE)[:, None, None]
    expected = pixels[0] * DARKENED
    expected[:, :8, :8] = outline  # patch 0: top left, the image's border is no edge
    expected[:, :7, :7] = pixels[0, :, :7, :7]
    torch.testing.assert_close(panel(picture, 0, 1, 32, 16), expected, rtol=0, atol=1 / 255)
    expected = pixels[1] * DARKENED
    expected[:, 8:16, 8:] = outline  # patch 3: second row, right
    expected[:, 9:15, 9:] = pixels[1, :, 9:15, 9:]
    torch.testing.assert_close(panel(picture, 1, 1, 32, 16), expected, rtol=0, atol=1 / 255)
    torch.testing.assert_close(panel(picture, 2, 1, 32, 16), pixels[2], rtol=0, atol=1 / 255)


def test_they_are_drawn_where_the_images_are():
    _, images, mask, scores = sample()
    elsewhere = [x.to("meta") for x in (images, mask, scores)]  # mixed devices are refused
    picture = draw_selection(*elsewhere, (4, 2), MEAN, STD)
    assert stack_samples([picture, picture]).device.type == "meta"


def test_higher_scores_are_brighter():
    _, images, mask, _ = sample()
    scores = torch.arange(8.0).expand(3, 8) * torch.tensor([[1.0], [100.0], [-1.0]])
    heat = panel(draw_selection(images * 0, mask, scores, (4, 2), MEAN, STD), 0, 2, 32, 16)
    brightness = heat.mean(0).unfold(0, 8, 8).unfold(1, 8, 8).mean((-1, -2)).flatten()
    assert (brightness.diff() > 0.02).all()
    other = draw_selection(images * 0, mask, scores, (4, 2), MEAN, STD)
    torch.testing.assert_close(panel(other, 1, 2, 32, 16), heat)  # each modality has its own scale


def test_odd_sizes_and_degenerate_scores():
    for scores in (torch.zeros(1, 6), torch.full((1, 6), float("nan"))):
        images = torch.full((1, 3, 35, 17), 50.0, dtype=torch.float16)
        picture = draw_selection(images, torch.ones(1, 6, dtype=torch.bool), scores, (3, 2), MEAN, STD)
        assert picture.shape == (3, 35, 3 * 17 + 2 * GAP)
        assert (panel(picture, 0, 0, 35, 17) == 1).all()


def test_stack_samples():
    _, images, mask, scores = sample()
    picture = draw_selection(images, mask, scores, (4, 2), MEAN, STD)
    stacked = stack_samples([picture, 255 - picture, picture])
    width = picture.shape[2]
    assert stacked.dtype == torch.uint8 and stacked.shape == (3, picture.shape[1], 3 * width + 2 * 4 * GAP)
    assert torch.equal(stacked[:, :, :width], picture) and torch.equal(stacked[:, :, -width:], picture)
    assert (stacked[:, :, width : width + 4 * GAP] == 255).all()


def test_draw_share_colours_every_cell():
    picture = draw_share(torch.tensor([[0.0, 1.0, 0.5, 0.0], [1.0] * 4]), (2, 2), cell=3)
    assert picture.shape == (3, 6, 6 + 2 + 6) and picture.dtype == torch.uint8
    dark, light = picture[:, 0, 0], picture[:, 0, 3]
    assert light.sum() > dark.sum() and torch.equal(picture[:, 5, 5], dark)
    assert torch.equal(picture[:, 2, 2], dark) and torch.equal(picture[:, 3, 8], light)
    assert (picture[:, :, 6:8] == 255).all()
